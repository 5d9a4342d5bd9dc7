// Included before every source of a sanitized build: masked loads and stores are intrinsics, which
// the compiler's sanitizer does not look into. Each is checked here up to its last lane.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#include <sanitizer/asan_interface.h>

template <class Pointer, class Mask>
static inline Pointer checked(Pointer at, Mask mask, int lane_bytes) {
    size_t bytes = mask ? size_t(64 - __builtin_clzll((unsigned long long)mask)) * lane_bytes : 0;
    // the reading of a poisoned byte is what gives the report
    if (bytes)
        if (void* bad = __asan_region_is_poisoned((void*)at, bytes)) (void)*(volatile char*)bad;
    return at;
}

#define _mm512_maskz_loadu_ps(mask, from) _mm512_maskz_loadu_ps(mask, checked(from, mask, 4))
#define _mm512_maskz_loadu_epi32(mask, from) \
    _mm512_maskz_loadu_epi32(mask, checked(from, mask, 4))
#define _mm256_maskz_loadu_epi16(mask, from) _mm256_maskz_loadu_epi16(mask, checked(from, mask, 2))
#define _mm512_mask_storeu_ps(to, mask, value) \
    _mm512_mask_storeu_ps(checked(to, mask, 4), mask, value)
#define _mm256_mask_storeu_epi16(to, mask, value) \
    _mm256_mask_storeu_epi16(checked(to, mask, 2), mask, value)
#endif
