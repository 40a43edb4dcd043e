"""Memory that is left: within the limits of control groups, of which files' pages give way."""

import pytest

from utils.memory import free_bytes, room_in_groups


def write(folder, **files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("groups", "folder", "names", "prefix"),
    [
        ("0::/slurm/job_7", "slurm/job_7", ("max", "current"), ""),
        (
            "4:cpuset:/\n3:memory:/slurm/job_7",
            "memory/slurm/job_7",
            ("limit_in_bytes", "usage_in_bytes"),
            "total_",
        ),
    ],
)
def test_the_room_is_the_least_of_a_group_and_its_parents(groups, folder, names, prefix, tmp_path):
    limit, used = names
    stat = f"{prefix}inactive_file 40\n{prefix}active_file 10\nanon 3"
    write(tmp_path / folder, **{limit: 100, used: 90, "stat": stat})
    write((tmp_path / folder).parent, **{limit: 70, used: 65, "stat": "anon 3"})
    write((tmp_path / folder).parents[1], **{limit: "max", used: 1, "stat": "anon 3"})
    assert list(room_in_groups(groups, tmp_path)) == [60, 5]


def test_this_machine_has_some():
    assert 1e6 < free_bytes() < 1e15
