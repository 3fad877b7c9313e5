"""What an attempt's process makes of what goes wrong before its build begins."""

from pathlib import Path

from buildenv.fake_engine import FakeEngine
from buildenv.run import StopSignal
from millrace.settings import Settings
from millrace.vocabulary import Reason, Verdict
from tests.unit.buildenv.test_run import Recorder, job
from worker import attempt
from worker.order import make_order


def test_an_engine_that_is_lost_between_claim_and_start_is_no_bug(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    order = make_order(job(tmp_path, "").claim, "w1", Settings(data_dir=tmp_path, engine="fake"))
    engine = FakeEngine({"FAKE_ENGINE_LOST": "info"})
    result = attempt._result(order, engine, recorder, recorder, StopSignal())  # type: ignore[arg-type]  # a sink and a depot in one
    assert result is not None
    assert (result.verdict, result.reason) == (Verdict.FAULT, Reason.ENGINE_LOST)
