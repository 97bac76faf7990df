"""Whether a call of a prepared model begins, found without running the model."""


class Accepted(Exception):
    """Raised in the place of the first forward of a call that was not refused."""


def is_accepted(module, call):
    """Whether `call` comes as far as `module`; else the words that refuse it."""

    def stop(module, args):
        raise Accepted

    with module.register_forward_pre_hook(stop):
        try:
            call()
        except Accepted:
            return True
        except ValueError as error:
            return str(error)
    raise AssertionError("the model was not run")
