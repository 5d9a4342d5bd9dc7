// What the machine can do: its instruction sets, and how fast its memory is read and copied.
#include <chrono>

#include "standard.h"

#include "crc32.h"

// Raised, with ABI of loader.py, whenever a function's arguments, the packed form of a weight or
// any bit of a result changes.
MS_VISIBLE int32_t ms_abi(void) {
    return 3;
}

// Whether the processor, and the system with it, can run x86_avx512_bf16.cpp.
MS_VISIBLE int32_t ms_has_avx512_bf16(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
           && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
           && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

namespace {

typedef uint64_t Line __attribute__((vector_size(64)));

// what a thread takes at a time: one that is held up does not hold up the others
constexpr int64_t kPiece = 1 << 20;
// how far ahead of its use a line is asked of memory
constexpr int64_t kAheadBytes = 4096;

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

uint64_t sum_of_piece(const char* from) {
    Line sums[4] = {};
    for (int64_t at = 0; at < kPiece; at += 4 * int64_t(sizeof(Line)))
        for (int line = 0; line < 4; line++) {
            const char* here = from + at + line * sizeof(Line);
            __builtin_prefetch(here + kAheadBytes);
            Line value;
            memcpy(&value, here, sizeof value);
            sums[line] += value;
        }
    Line sum = sums[0] + sums[1] + sums[2] + sums[3];
    uint64_t total = 0;
    for (int lane = 0; lane < 8; lane++) total += sum[lane];
    return total;
}

}  // namespace

// Seconds to read `bytes`, a multiple of 1 MiB, once; *sum is of the 64-bit words, so that the
// reading is not left out.
MS_VISIBLE double ms_read_seconds(
    int32_t threads, const void* memory, int64_t bytes, uint64_t* sum) {
    const char* from = (const char*)memory;
    uint64_t total = 0;
    double start = now();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(+ : total)
    for (int64_t at = 0; at < bytes; at += kPiece) total += sum_of_piece(from + at);
    double seconds = now() - start;
    *sum = total;
    return seconds;
}

// Seconds to copy `bytes`, a multiple of 1 MiB, to memory that does not overlap.
MS_VISIBLE double ms_copy_seconds(int32_t threads, const void* memory, void* to, int64_t bytes) {
    double start = now();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t at = 0; at < bytes; at += kPiece)
        memcpy((char*)to + at, (const char*)memory + at, kPiece);
    return now() - start;
}

// Whether ms_crc32 is faster here than what others bring.
MS_VISIBLE int32_t ms_has_fast_crc32(void) {
    return ms::has_carryless();
}

// crc32 of zlib. Needs ms_has_fast_crc32.
MS_VISIBLE int64_t ms_crc32(const void* data, int64_t size) {
    return ms::crc32((const uint8_t*)data, size);
}
