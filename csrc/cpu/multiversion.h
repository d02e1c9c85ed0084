// HF_MULTIVERSION: compile a function for several vector widths and pick one when the library is loaded.
#pragma once

// Needs the loader's indirect functions (glibc). A sanitiser's run-time is not yet up when those resolve.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__) &&                                                   \
    ((defined(__clang__) && __clang_major__ >= 16) || (!defined(__clang__) && __GNUC__ >= 12))
#define HF_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HF_MULTIVERSION
#endif

// Only what is inlined into a clone is compiled for its vector width.
#define HF_INLINE inline __attribute__((always_inline))
