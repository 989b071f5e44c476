"""In each of several processes: saves sharded models as OLMo-core's trainer saves them."""

from engine_models import DENSE, MOE, config_of
from olmo_core.distributed.checkpoint import save_model_and_optim_state
from olmo_core.train import prepare_training_environment, teardown_training_environment
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from gated_attention.engine import engine_config, load_weights


def main(folder):
    prepare_training_environment(backend="gloo", shared_filesystem=True)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for name, size in (("dense", DENSE), ("moe", MOE)):
        model = engine_config(config_of("sdpa-elementwise", size)).build()
        model.apply_fsdp(mesh)
        load_weights(model, folder / name)
        save_model_and_optim_state(folder / f"{name}-saved", model)
    teardown_training_environment()
