import os
import subprocess
import sys

import pytest

from nextscale import processes


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def _launch(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_one_process_is_main_and_owns_everything() -> None:
    assert (processes.rank(), processes.local_rank(), processes.world_size()) == (0, 0, 1)
    assert processes.is_main()
    assert processes.own_range(7) == range(7)
    processes.barrier()


def test_a_cluster_variable_alone_is_not_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert processes.world_size() == 1
    assert processes.local_rank() == 0


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 1000])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shards_cover_each_item_once(
    monkeypatch: pytest.MonkeyPatch, count: int, world: int
) -> None:
    shards = []
    for rank in range(world):
        _launch(monkeypatch, rank, world)
        shards.append(processes.own_range(count))
    assert [item for shard in shards for item in shard] == list(range(count))
    lengths = [len(shard) for shard in shards]
    assert max(lengths) - min(lengths) <= 1


def test_barrier_without_a_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _launch(monkeypatch, 1, 2)
    assert not processes.is_main()
    with pytest.raises(RuntimeError, match="PartialState"):
        processes.barrier()


_CHILD = """
import sys
import torch.distributed as dist
from nextscale import processes
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
processes.barrier()
print(processes.rank(), processes.world_size(), list(processes.own_range(5)))
dist.destroy_process_group()
"""


def test_two_gloo_processes_know_their_ranks(tmp_path: object) -> None:
    # Started without RANK in the environment: the initialised group must be asked.
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(rank), f"{tmp_path}/meet"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    answers = [child.communicate(timeout=120) for child in children]
    assert [answer[0].strip() for answer in answers] == ["0 2 [0, 1]", "1 2 [2, 3, 4]"], answers


def test_importing_the_package_stays_light() -> None:
    code = (
        "import sys, nextscale, nextscale.processes, nextscale.storage, nextscale.errors;"
        "print([m for m in ('torch', 'numpy', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
