// Included ahead of every unit by the build: refuses flags under which the kernels would compute other numbers.
#pragma once

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "the kernels need IEEE arithmetic: remove -Ofast, -ffast-math and their like from the compiler's flags"
#endif
