"""What is done about a run's directory: what is there, what was asked for, what is done."""

from __future__ import annotations

import itertools

import pytest

from harness.runs.decision import Decision, Found, Request, decide

FINISHED = Found("finished", same=True, ended=100)
FAILED = Found("failed", same=True, failure_class="nan", ended=100)
KILLED = Found("failed", same=True, failure_class="killed", ended=100)
CUT = Found("interrupted", same=True, can_resume=True, ended=100)
FAILED_LATE = Found("failed", same=True, failure_class="nan", can_resume=True, ended=100)
OTHERS_FINISHED = Found("finished", same=False, ended=100)
OTHERS_CUT = Found("running", same=False, can_resume=True, ended=100)
OTHERS_FAILED = Found("failed", same=False, failure_class="nan", ended=100)


@pytest.mark.parametrize(
    ("found", "request_", "decided"),
    [
        (Found(), Request(), Decision.START),
        (Found(other_files=True), Request(), Decision.REFUSE_FILES),
        (Found(other_files=True), Request(rerun=True), Decision.START),
        (FINISHED, Request(), Decision.SKIP),
        (FINISHED, Request(sweep=True), Decision.SKIP),
        (FINISHED, Request(rerun=True), Decision.START),
        (OTHERS_FINISHED, Request(), Decision.REFUSE_FINISHED),
        (OTHERS_FINISHED, Request(retry=1, sweep=True), Decision.REFUSE_FINISHED),
        (OTHERS_FINISHED, Request(rerun=True), Decision.START),
        (CUT, Request(), Decision.RESUME),
        (CUT, Request(sweep=True), Decision.RESUME),
        (CUT, Request(rerun=True), Decision.START),
        (OTHERS_CUT, Request(), Decision.REFUSE_UNFINISHED),
        (Found("running", same=True), Request(), Decision.START),
        (FAILED, Request(), Decision.START),
        (FAILED, Request(sweep=True), Decision.LEAVE),
        (FAILED, Request(retry=1, sweep=True), Decision.START),
        (FAILED_LATE, Request(sweep=True), Decision.LEAVE),
        (FAILED_LATE, Request(retry=1, sweep=True), Decision.RESUME),
        (FAILED_LATE, Request(), Decision.RESUME),
        (KILLED, Request(sweep=True), Decision.START),
        (OTHERS_FAILED, Request(sweep=True), Decision.START),
        # Another controller of the same sweep, which began at 50, has done it.
        (FINISHED, Request(rerun=True, sweep=True, since=50), Decision.SKIP),
        (FAILED, Request(rerun=True, sweep=True, since=50), Decision.LEAVE),
        (FAILED, Request(retry=3, sweep=True, since=50), Decision.LEAVE),
        (FINISHED, Request(rerun=True, sweep=True, since=150), Decision.START),
        (OTHERS_FINISHED, Request(rerun=True, sweep=True, since=50), Decision.START),
    ],
)
def test_what_is_done(found, request_, decided):
    assert decide(found, request_) is decided


STATES = [Found(), Found(other_files=True)] + [
    Found(status, same, failure, can_resume, ended=100)
    for status in ("finished", "failed", "interrupted", "running")
    for same, can_resume in itertools.product((True, False), repeat=2)
    for failure in (("nan", "killed", "config") if status == "failed" else (None,))
]
REQUESTS = [
    Request(rerun, retry, sweep, since)
    for rerun, sweep in itertools.product((True, False), repeat=2)
    for retry in (0, 2)
    for since in (None, 50, 150)
]


@pytest.mark.parametrize("found", STATES, ids=str)
def test_nothing_of_another_configuration_is_lost_or_taken_for_this_one(found):
    for request_ in REQUESTS:
        decided = decide(found, request_)
        if found.status is not None and not found.same:
            assert decided not in (Decision.SKIP, Decision.LEAVE, Decision.RESUME)
            if (found.status == "finished" or found.can_resume) and not request_.rerun:
                assert decided in (Decision.REFUSE_FINISHED, Decision.REFUSE_UNFINISHED)
        if decided is Decision.RESUME:
            assert found.can_resume and found.same and not request_.rerun
        if decided is Decision.SKIP:
            assert found.status == "finished"
        if found.status == "finished" and found.same and not request_.rerun:
            assert decided is Decision.SKIP  # never done twice
