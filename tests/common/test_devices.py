"""The rules of devices.py: what they leave out has a stand-in, and what they choose covers everything."""

import re

from tests.common import devices


def defined_tests() -> dict[str, set[str]]:
    return {
        path.relative_to(devices.TESTS).as_posix(): set(re.findall(r"^def (test_\w+)\(", path.read_text(), re.M))
        for path in devices.TESTS.rglob("test_*.py")
    }


def test_every_test_left_out_exists_and_so_does_what_stands_in() -> None:
    defined = defined_tests()
    every_name = set().union(*defined.values())
    for left_out, (reason, stand_in) in devices.NOT_EMULATED.items():
        file, _, name = left_out.partition("::")
        assert name in defined[file], left_out
        assert stand_in in every_name and stand_in != name and reason
    for thinned in devices.THINNED:
        file, _, name = thinned.partition("::")
        assert name in defined[file], thinned


def test_schedules_cover_every_way() -> None:
    schedules = [devices.schedule_of(f"test_{idx}") for idx in range(200)]
    assert len({(s["order"], s["cp_async"], s["shared_limit"]) for s in schedules}) == 18
    assert {s["compute_capability"] for s in schedules} == {80, 90, 120}
    assert devices.schedule_of("test_3") == devices.schedule_of("test_3")
