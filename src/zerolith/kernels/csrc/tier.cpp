// All functions for one instruction set: compiled with -DZL_GENERIC, -DZL_NEON, -DZL_AVX2 or -DZL_AVX512.
#include "passes.h"

#if defined(ZL_AVX512)
#define TIER TIER_AVX512
#elif defined(ZL_AVX2)
#define TIER TIER_AVX2
#elif defined(ZL_NEON)
#define TIER TIER_NEON
#else
#define TIER TIER_GENERIC
#endif

#define TARGETS_OF(RULE, GRAD)                                                                            \
    {update<RULE, GRAD, PlainMaster, Fp32>, update<RULE, GRAD, PlainMaster, Bf16>,                        \
     update<RULE, GRAD, PlainMaster, Fp16>, update<RULE, GRAD, PlainMaster, Nowhere>,                     \
     update<RULE, GRAD, SplitMaster, Nowhere>}
#define FORMATS_OF(RULE) {TARGETS_OF(RULE, Fp32), TARGETS_OF(RULE, Bf16), TARGETS_OF(RULE, Fp16)}

// In the order of the enumerations in tier.h.
extern const Tier TIER = {
    {FORMATS_OF(AdamWRule), FORMATS_OF(AdamL2Rule), FORMATS_OF(LionRule), FORMATS_OF(AdagradRule), FORMATS_OF(SgdRule),
     FORMATS_OF(MomentumRule)},
    {square_sums<Fp32>, square_sums<Bf16>, square_sums<Fp16>},
    {add_terms<Fp32>, add_terms<Bf16>, add_terms<Fp16>},
    convert<split_some>,
    convert<join_some>,
    {copy<Fp32>, copy<Bf16>, copy<Fp16>},
};
