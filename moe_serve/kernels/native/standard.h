// What the kernels take from the compiler and its library. Included before any instruction set is
// chosen, so that no inline function of the library is compiled for a machine that may not be here.
// Templates of the library are, where they are used: that is why the file of an instruction set
// comes after plain.cpp in the order of linking (x86_...), whose copies then serve both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "arguments.h"

#define MS_VISIBLE extern "C" __attribute__((visibility("default")))
