// Every kernel in plain C++, for any machine.
#include "standard.h"

#include "transfers.h"

namespace ms {
namespace plain {
#include "kernels.h"
}  // namespace plain
}  // namespace ms

#define MS_EXPORT(name) ms_##name##_plain
#define MS_ISA ms::plain
#include "exports.h"

// Sizes of the structures that Python has copies of, for it to compare.
MS_VISIBLE int64_t ms_sizes(int32_t which) {
    const int64_t sizes[] = {
        sizeof(ms::LayerArguments), sizeof(ms::ModelArguments), sizeof(ms::StepArguments),
        sizeof(ms::AttentionPlan), sizeof(ms::Progress), sizeof(ms::Arrivals),
        sizeof(ms::LearnedIds)};
    return sizes[which];
}
