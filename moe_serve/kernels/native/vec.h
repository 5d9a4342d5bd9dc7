// Sixteen floats at a time: all that the kernels know of an instruction set.
//
// Included once by each instruction set's .cpp, inside its namespace, with MS_AVX512_BF16 defined or
// not. What is not overridden is plain C++ on the compiler's own vectors, which any machine runs.
// No operation is contracted or reordered by the compiler: what is fused is written as `fma`.

struct bf16 {
    uint16_t bits;
};

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

constexpr int kLanes = 16;

static inline Ints splat_int(int32_t value) {
    return Ints{} + value;
}

static inline float to_float(float value) {
    return value;
}

static inline float to_float(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

// Masks: -1 in the lanes where it is so, else 0.

#ifdef MS_AVX512_BF16

static inline Ints is_more(Floats a, Floats b) {
    return a > b;
}

static inline Ints is_equal(Floats a, Floats b) {
    return a == b;
}

static inline Ints is_less(Ints a, Ints b) {
    return a < b;
}

static inline bool is_any(Ints mask) {
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
}

static inline Floats selected(Ints mask, Floats yes, Floats no) {
    return mask ? yes : no;
}

#else

// By fours: compilers take comparisons of longer vectors than the machine's apart into lanes.
template <class T, class TCompare>
static inline Ints compared(T a, T b, TCompare compare) {
    typedef float FourFloats __attribute__((vector_size(16)));
    typedef int32_t FourInts __attribute__((vector_size(16)));
    typename std::conditional<std::is_same<T, Floats>::value, FourFloats, FourInts>::type as[4],
        bs[4];
    FourInts masks[4];
    memcpy(as, &a, sizeof a);
    memcpy(bs, &b, sizeof b);
    for (int four = 0; four < 4; four++) masks[four] = compare(as[four], bs[four]);
    Ints mask;
    memcpy(&mask, masks, sizeof mask);
    return mask;
}

static inline Ints is_more(Floats a, Floats b) {
    return compared(a, b, [](auto x, auto y) { return x > y; });
}

static inline Ints is_equal(Floats a, Floats b) {
    return compared(a, b, [](auto x, auto y) { return x == y; });
}

static inline Ints is_less(Ints a, Ints b) {
    return compared(a, b, [](auto x, auto y) { return x < y; });
}

static inline bool is_any(Ints mask) {
    uint64_t words[kLanes / 2], all = 0;
    memcpy(words, &mask, sizeof words);
    for (uint64_t word : words) all |= word;
    return all != 0;
}

static inline Floats selected(Ints mask, Floats yes, Floats no) {
    return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}

#endif

#ifdef MS_AVX512_BF16

static inline Floats splat(float value) {
    return (Floats)_mm512_set1_ps(value);
}

static inline __mmask16 first_lanes(int64_t count) {
    return count >= kLanes ? 0xFFFF : (__mmask16)((1u << count) - 1);
}

static inline Floats load(const float* from) {
    return (Floats)_mm512_loadu_ps(from);
}

static inline Floats load(const float* from, int64_t count) {
    return (Floats)_mm512_maskz_loadu_ps(first_lanes(count), from);
}

static inline void store(float* to, Floats value) {
    _mm512_storeu_ps(to, (__m512)value);
}

static inline void store(float* to, Floats value, int64_t count) {
    _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)value);
}

static inline Floats widened(__m256i bits) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

static inline Floats load(const bf16* from) {
    return widened(_mm256_loadu_si256((const __m256i*)from));
}

static inline Floats load(const bf16* from, int64_t count) {
    return widened(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}

static inline __m256i narrowed(Floats value) {
    return (__m256i)_mm512_cvtneps_pbh((__m512)value);
}

static inline void store(bf16* to, Floats value) {
    _mm256_storeu_si256((__m256i*)to, narrowed(value));
}

static inline void store(bf16* to, Floats value, int64_t count) {
    _mm256_mask_storeu_epi16(to, first_lanes(count), narrowed(value));
}

static inline Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

// The larger of each pair; b where either is NaN.
static inline Floats larger(Floats a, Floats b) {
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
}

static inline Floats square_root(Floats value) {
    return (Floats)_mm512_sqrt_ps((__m512)value);
}

#else

static inline Floats splat(float value) {
    return Floats{} + value;
}

static inline Floats load(const float* from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline Floats load(const float* from, int64_t count) {
    Floats value{};
    memcpy(&value, from, (count < kLanes ? count : kLanes) * sizeof(float));
    return value;
}

static inline void store(float* to, Floats value) {
    memcpy(to, &value, sizeof value);
}

static inline void store(float* to, Floats value, int64_t count) {
    memcpy(to, &value, (count < kLanes ? count : kLanes) * sizeof(float));
}

static inline Floats load(const bf16* from) {
    Words bits;
    for (int lane = 0; lane < kLanes; lane++) bits[lane] = uint32_t(from[lane].bits) << 16;
    return (Floats)bits;
}

static inline Floats load(const bf16* from, int64_t count) {
    bf16 all[kLanes] = {};
    memcpy(all, from, (count < kLanes ? count : kLanes) * sizeof(bf16));
    return load(all);
}

static inline void store(bf16* to, Floats value) {
    Words bits = (Words)value;
    // to the nearest, ties to even; a NaN keeps its top bits and stays one
    Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    Words quiet = (bits >> 16) | 0x40;
    rounded = (Words)selected(is_equal(value, value), (Floats)rounded, (Floats)quiet);
    for (int lane = 0; lane < kLanes; lane++) to[lane].bits = uint16_t(rounded[lane]);
}

static inline void store(bf16* to, Floats value, int64_t count) {
    bf16 all[kLanes];
    store(all, value);
    memcpy(to, all, (count < kLanes ? count : kLanes) * sizeof(bf16));
}

static inline Floats fma(Floats a, Floats b, Floats c) {
    return a * b + c;
}

// The larger of each pair; b where either is NaN.
static inline Floats larger(Floats a, Floats b) {
    return selected(is_more(a, b), a, b);
}

static inline Floats square_root(Floats value) {
    for (int lane = 0; lane < kLanes; lane++) value[lane] = __builtin_sqrtf(value[lane]);
    return value;
}

#endif

// The smaller of each pair; b where either is NaN.
static inline Floats smaller(Floats a, Floats b) {
    return -larger(-a, -b);
}

// What `value` becomes where it is kept as T, as floats again.
template <class T>
static inline Floats rounded_to(Floats value) {
    T kept[kLanes];
    store(kept, value);
    return load(kept);
}

template <>
inline Floats rounded_to<float>(Floats value) {
    return value;
}

// Sum of the lanes, in one order: halves onto halves.
static inline float sum_of(Floats value) {
    float lanes[kLanes];
    store(lanes, value);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

// Largest lane; NaN where one is NaN.
static inline float largest_of(Floats value) {
    float lanes[kLanes];
    store(lanes, value);
    float best = lanes[0];
    for (int lane = 1; lane < kLanes; lane++)
        if (lanes[lane] > best || lanes[lane] != lanes[lane]) best = lanes[lane];
    return best;
}

// e^x within 2 units in the last place; 0 below -87.3, inf above 88.7, NaN for NaN.
static inline Floats exp(Floats x) {
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Floats clamped = larger(smaller(x, splat(88.8f)), splat(-87.4f));
    Floats shifted = fma(clamped, splat(1.44269504f), magic);
    Floats whole = shifted - magic;
    Floats rest = fma(whole, splat(-0.693359375f), clamped);
    rest = fma(whole, splat(2.12194440e-4f), rest);
    Floats series = splat(1.9875691500e-4f);
    series = fma(series, rest, splat(1.3981999507e-3f));
    series = fma(series, rest, splat(8.3334519073e-3f));
    series = fma(series, rest, splat(4.1665795894e-2f));
    series = fma(series, rest, splat(1.6666665459e-1f));
    series = fma(series, rest, splat(5.0000001201e-1f));
    series = fma(series, rest * rest, rest) + 1.0f;
    // times 2^whole in two steps: one alone would leave the range of exponents
    Ints power = (Ints)shifted - (Ints)magic;
    Ints half = power >> 1;
    Floats result = series * (Floats)((half + 127) << 23) * (Floats)((power - half + 127) << 23);
    result = selected(is_more(splat(-87.3f), x), splat(0.0f), result);
    result = selected(is_more(x, splat(88.72283f)), splat(__builtin_inff()), result);
    return selected(is_equal(x, x), result, x);
}

static inline Floats silu(Floats x) {
    return x / (exp(-x) + 1.0f);
}
