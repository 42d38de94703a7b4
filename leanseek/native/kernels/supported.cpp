// Tells whether this CPU and operating system support the instruction set that the rest of this library was compiled for.
// This file is compiled without any -m flag, so that it runs on every x86-64.
#define HAS(feature) (__builtin_cpu_supports(#feature) != 0)

enum { AVX2, AVX512, AVX512_BF16 };

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The hash of the sources that this library was built from (CMakeLists.txt).
EXPORTED const char* sources() { return SOURCES; }

EXPORTED int supported() {
    __builtin_cpu_init();
    bool has = HAS(avx2) && HAS(fma) && HAS(f16c);
    if (VARIANT >= AVX512) has = has && HAS(avx512f) && HAS(avx512bw) && HAS(avx512dq) && HAS(avx512vl);
    if (VARIANT >= AVX512_BF16) has = has && HAS(avx512vbmi) && HAS(avx512vnni) && HAS(avx512bf16);
    return has;
}
