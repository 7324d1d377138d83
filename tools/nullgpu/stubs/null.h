/* What the stubs share: the device that is pretended, the counters that tools/nullgpu/counters.py reads, and memory. */
#pragma once
#include <stddef.h>

#define NULLGPU_MEMORY (143771ull << 20) /* bytes of one device, as an H200 reports */
#define NULLGPU_NAME "NVIDIA H200"
#define NULLGPU_SMS 132
#define NULLGPU_L2 (60 << 20)
#define NULLGPU_SHARED_PER_BLOCK 232448 /* bytes, the opt-in limit */
#define NULLGPU_SHARED_PER_SM 233472
#define NULLGPU_REGISTERS 65536
#define NULLGPU_CUDA 13000 /* as cudaRuntimeGetVersion counts */

/* Attributes have the same numbers in the runtime and the driver. */
enum {
    NULLGPU_ATTRIBUTE_MAX_THREADS = 1,
    NULLGPU_ATTRIBUTE_MAX_GRID_X = 5,
    NULLGPU_ATTRIBUTE_WARP = 10,
    NULLGPU_ATTRIBUTE_REGISTERS = 12,
    NULLGPU_ATTRIBUTE_CLOCK_KHZ = 13,
    NULLGPU_ATTRIBUTE_SMS = 16,
    NULLGPU_ATTRIBUTE_MEMORY_CLOCK_KHZ = 36,
    NULLGPU_ATTRIBUTE_BUS_BITS = 37,
    NULLGPU_ATTRIBUTE_L2 = 38,
    NULLGPU_ATTRIBUTE_THREADS_PER_SM = 39,
    NULLGPU_ATTRIBUTE_MAJOR = 75,
    NULLGPU_ATTRIBUTE_MINOR = 76,
    NULLGPU_ATTRIBUTE_SHARED_PER_SM = 81,
    NULLGPU_ATTRIBUTE_REGISTERS_PER_SM = 82,
    NULLGPU_ATTRIBUTE_SHARED_OPT_IN = 97,
};

static inline int nullgpu_attribute(int which) {
    switch (which) {
    case NULLGPU_ATTRIBUTE_MAX_THREADS: return 1024;
    case NULLGPU_ATTRIBUTE_MAX_GRID_X: return 2147483647;
    case NULLGPU_ATTRIBUTE_WARP: return 32;
    case NULLGPU_ATTRIBUTE_REGISTERS:
    case NULLGPU_ATTRIBUTE_REGISTERS_PER_SM: return NULLGPU_REGISTERS;
    case NULLGPU_ATTRIBUTE_CLOCK_KHZ: return 1980000;
    case NULLGPU_ATTRIBUTE_SMS: return NULLGPU_SMS;
    case NULLGPU_ATTRIBUTE_MEMORY_CLOCK_KHZ: return 3201000;
    case NULLGPU_ATTRIBUTE_BUS_BITS: return 6144;
    case NULLGPU_ATTRIBUTE_L2: return NULLGPU_L2;
    case NULLGPU_ATTRIBUTE_THREADS_PER_SM: return 2048;
    case NULLGPU_ATTRIBUTE_MAJOR: return 9;
    case NULLGPU_ATTRIBUTE_MINOR: return 0;
    case NULLGPU_ATTRIBUTE_SHARED_PER_SM: return NULLGPU_SHARED_PER_SM;
    case NULLGPU_ATTRIBUTE_SHARED_OPT_IN: return NULLGPU_SHARED_PER_BLOCK;
    default: return 0;
    }
}

int nullgpu_devices(void); /* NULLGPU_DEVICES, 1 by default */

/* Counters, read by name. A plain long: launches come from few threads, and a count that is one short shows nothing wrong. */
extern long nullgpu_aten;        /* kernels launched by the runtime's API: PyTorch's own and xformers' */
extern long nullgpu_library;     /* calls to cuBLAS, cuDNN and cuSOLVER that would compute */
extern long nullgpu_collectives; /* calls to NCCL that would send */
extern long nullgpu_waits;       /* calls in which the host waits for the device */
extern long nullgpu_uploads;     /* copies from the host to the device */
extern long nullgpu_allocations; /* cudaMalloc */
extern long nullgpu_used;        /* bytes allocated on all devices */
extern long nullgpu_peak;        /* most bytes allocated at a time */
