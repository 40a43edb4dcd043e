"""The configurations of accelerate's launcher are read by accelerate, and are plain data parallel."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.support import small


@pytest.mark.parametrize(("name", "processes", "machines"), [("1-gpu", 1, 1), ("8-gpus", 8, 1), ("16-gpus", 16, 2)])
def test_a_configuration_starts_so_many_processes(name, processes, machines):
    config = load_config_from_file(str(small.ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert config.distributed_type == ("NO" if processes == 1 else "MULTI_GPU")
    assert config.mixed_precision == "no" and not config.use_cpu
