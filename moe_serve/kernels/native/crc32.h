// The crc32 of zlib, by carry-less multiplication: four 128-bit remainders are folded side by side
// (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel, 2009).
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ms {

// Bit by bit: for what is too short to fold. `crc` is inverted, as between two pieces.
static inline uint32_t crc32_of_bytes(uint32_t crc, const uint8_t* data, int64_t size) {
    for (int64_t at = 0; at < size; at++) {
        crc ^= data[at];
        for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (0xEDB88320u & (0u - (crc & 1)));
    }
    return crc;
}

#if defined(__x86_64__)

// x^n mod P of the reflected polynomial, for a fold over 512 bits, over 128, and to 32.
alignas(16) static const uint64_t kFold512[2] = {0x0154442bd4, 0x01c6e41596};
alignas(16) static const uint64_t kFold128[2] = {0x01751997d0, 0x00ccaa009e};
alignas(16) static const uint64_t kFold64[2] = {0x0163cd6124, 0};
alignas(16) static const uint64_t kBarrett[2] = {0x01db710641, 0x01f7011641};

__attribute__((target("pclmul,sse4.1"))) static inline __m128i folded(
    __m128i value, __m128i constants, __m128i next) {
    const __m128i low = _mm_clmulepi64_si128(value, constants, 0x00);
    const __m128i high = _mm_clmulepi64_si128(value, constants, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// size: a multiple of 16, at least 64.
__attribute__((target("pclmul,sse4.1"))) static inline uint32_t crc32_folded(
    uint32_t crc, const uint8_t* data, int64_t size) {
    const auto load = [](const uint8_t* from) __attribute__((target("pclmul,sse4.1"))) {
        return _mm_loadu_si128((const __m128i*)from);
    };
    __m128i parts[4];
    for (int part = 0; part < 4; part++) parts[part] = load(data + 16 * part);
    parts[0] = _mm_xor_si128(parts[0], _mm_cvtsi32_si128(int32_t(crc)));
    data += 64;
    size -= 64;
    const __m128i over512 = _mm_load_si128((const __m128i*)kFold512);
    for (; size >= 64; data += 64, size -= 64)
        for (int part = 0; part < 4; part++)
            parts[part] = folded(parts[part], over512, load(data + 16 * part));
    const __m128i over128 = _mm_load_si128((const __m128i*)kFold128);
    __m128i value = parts[0];
    for (int part = 1; part < 4; part++) value = folded(value, over128, parts[part]);
    for (; size >= 16; data += 16, size -= 16) value = folded(value, over128, load(data));
    // 128 bits to 64, to 32
    const __m128i mask = _mm_setr_epi32(~0, 0, ~0, 0);
    value = _mm_xor_si128(_mm_srli_si128(value, 8), _mm_clmulepi64_si128(value, over128, 0x10));
    const __m128i to64 = _mm_load_si128((const __m128i*)kFold64);
    value = _mm_xor_si128(
        _mm_srli_si128(value, 4), _mm_clmulepi64_si128(_mm_and_si128(value, mask), to64, 0x00));
    const __m128i barrett = _mm_load_si128((const __m128i*)kBarrett);
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(value, mask), barrett, 0x10);
    quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, mask), barrett, 0x00);
    return uint32_t(_mm_extract_epi32(_mm_xor_si128(value, quotient), 1));
}

static inline bool has_carryless() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

#else

static inline uint32_t crc32_folded(uint32_t crc, const uint8_t* data, int64_t size) {
    return crc32_of_bytes(crc, data, size);
}

static inline bool has_carryless() { return false; }

#endif

// crc32 of zlib. Fast where has_carryless.
static inline uint32_t crc32(const uint8_t* data, int64_t size) {
    const int64_t whole = size >= 64 ? size / 16 * 16 : 0;
    uint32_t crc = ~0u;
    if (whole) crc = crc32_folded(crc, data, whole);
    return ~crc32_of_bytes(crc, data + whole, size - whole);
}

// The product of two polynomials mod P; the highest bit is that of x^0.
static inline uint32_t crc32_product(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit) product ^= b;
        b = (b >> 1) ^ (0xEDB88320u & (0u - (b & 1)));
    }
    return product;
}

// x^(8 size) mod P: what a crc is multiplied with when `size` bytes follow.
static inline uint32_t crc32_shift(int64_t size) {
    uint32_t shift = 1u << 31, power = 1u << 23;
    for (; size; size >>= 1) {
        if (size & 1) shift = crc32_product(shift, power);
        power = crc32_product(power, power);
    }
    return shift;
}

// The crc of two pieces from theirs; shift: crc32_shift of the second one's size.
static inline uint32_t crc32_joined(uint32_t first, uint32_t second, uint32_t shift) {
    return crc32_product(first, shift) ^ second;
}

}  // namespace ms
