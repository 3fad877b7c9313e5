"""When containers are parked: not while the first build of a new mould makes its own. Real processes, the fake engine."""

import os
import threading
import time
from pathlib import Path

from buildenv.parking import Mould
from millrace.settings import Settings
from tests.support.farm import wait_until
from worker.lot import Lot
from worker.nursery import Nursery
from worker.order import make_park_order

MOULD = Mould(image="some/image:1", cpus=1, memory_bytes=1024**3, pids=100, network="none")


def test_a_mould_that_is_new_is_parked_for_once_its_first_build_is_under_way(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, engine="fake")
    nursery = Nursery({"PATH": os.environ["PATH"]})
    lot = Lot(nursery, lambda place, mould: make_park_order(place, mould, "w", settings), 1)
    stop = threading.Event()
    tending = threading.Thread(target=lot.tend_forever, args=(stop,))
    tending.start()
    try:
        began = time.monotonic()
        first = lot.take(MOULD)
        assert first.mould is None
        first.child.close()
        wait_until(lambda: any(one.mould == MOULD for one in lot._waiting))
        assert time.monotonic() - began > 1
        second = lot.take(MOULD)
        assert second.mould == MOULD
        second.child.dismiss()
    finally:
        stop.set()
        lot.close()
        nursery.close()
        tending.join()
