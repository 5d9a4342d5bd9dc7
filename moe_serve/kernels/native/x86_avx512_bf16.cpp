// Every kernel for processors with AVX512-BF16 (Intel Cooper Lake and Sapphire Rapids, AMD Zen 4
// and later).
#include "standard.h"

#include "transfers.h"

#if defined(__x86_64__)
#if !defined(__clang__)
// false alarms within gcc's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif
#define MS_AVX512_BF16

namespace ms {
namespace avx512_bf16 {
#include "kernels.h"
}  // namespace avx512_bf16
}  // namespace ms

#define MS_EXPORT(name) ms_##name##_avx512_bf16
#define MS_ISA ms::avx512_bf16
#include "exports.h"
#endif
