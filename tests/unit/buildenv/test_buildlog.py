"""The build's log hides all that it was told to hide."""

from buildenv.buildlog import BuildLog


def test_what_is_to_be_hidden_adds_up() -> None:
    sent: list[bytes] = []
    log = BuildLog(sent.append, lambda: None)
    log.hide(["token-of-git"])
    log.hide(["hunter22"])
    log.output(b"token-of-git hunter22\n")
    log.end()
    assert b"".join(sent) == b"*** ***\n"
    assert log.hidden("not hunter22 and no token-of-git") == "not *** and no ***"
