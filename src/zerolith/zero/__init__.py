"""Access to sharded parameters, and building models that never exist whole."""

from zerolith.zero.access import (
    safe_get_full_fp32_param as safe_get_full_fp32_param,
    safe_get_full_grad as safe_get_full_grad,
    safe_get_full_optimizer_state as safe_get_full_optimizer_state,
    safe_get_local_fp32_param as safe_get_local_fp32_param,
    safe_get_local_grad as safe_get_local_grad,
    safe_get_local_optimizer_state as safe_get_local_optimizer_state,
    safe_set_full_fp32_param as safe_set_full_fp32_param,
    safe_set_full_grad as safe_set_full_grad,
    safe_set_full_optimizer_state as safe_set_full_optimizer_state,
    safe_set_local_fp32_param as safe_set_local_fp32_param,
    safe_set_local_grad as safe_set_local_grad,
    safe_set_local_optimizer_state as safe_set_local_optimizer_state,
)
from zerolith.zero.gathered import GatheredParameters as GatheredParameters
from zerolith.zero.init import Init as Init
from zerolith.zero.marks import (
    get_z3_leaf_modules as get_z3_leaf_modules,
    register_external_parameter as register_external_parameter,
    set_z3_leaf_modules as set_z3_leaf_modules,
    unregister_external_parameter as unregister_external_parameter,
    unset_z3_leaf_modules as unset_z3_leaf_modules,
)
