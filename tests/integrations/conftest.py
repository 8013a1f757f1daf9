"""The judge of parity, and its report: the worst error of each family, after every run that compared any."""

import pytest
from tests.integrations.parity import Judge

JUDGE = pytest.StashKey[Judge]()


@pytest.fixture(scope="session")
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Oracles and checkpoints, made once a session."""
    made = Judge(tmp_path_factory.mktemp("toys"))
    request.config.stash[JUDGE] = made
    return made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    judge = terminalreporter.config.stash.get(JUDGE, None)
    if judge is None or not judge.cells:
        return
    terminalreporter.section("parity: worst relative error by family (fp32)")
    head = (
        f"{'family':<14}{'cells':>6}{'loss':>10}{'logits':>10}{'norm':>10}{'gradients':>11}{'parameters':>12}"
    )
    terminalreporter.line(head)
    for family, cells in sorted(judge.cells.items()):
        loss, logits, norm, gradients, parameters = (
            max(kind) for kind in zip(*(c[:-1] for c in cells), strict=True)
        )
        terminalreporter.line(
            f"{family:<14}{len(cells):>6}{loss:>10.1e}{logits:>10.1e}{norm:>10.1e}{gradients:>11.1e}{parameters:>12.1e}"
        )
