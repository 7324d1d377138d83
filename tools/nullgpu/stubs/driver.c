/* The CUDA driver, libcuda.so.1: what Triton's launcher, PyTorch and DALI ask of it. */
#define _GNU_SOURCE
#include "null.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
long nullgpu_triton; /* kernels launched through the driver's API: Triton's */

Result cuStub() { return 0; }

static int devices(void) {
    const char *asked = getenv("NULLGPU_DEVICES");
    return asked ? atoi(asked) : 1;
}

/* Handles of one context for all threads, and of modules, functions, streams and events. */
static void *const CONTEXT = (void *)0x10;
static Result made(void **handle) {
    *handle = malloc(64);
    return 0;
}

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) {
    *version = NULLGPU_CUDA + 90;
    return 0;
}
Result cuDeviceGetCount(int *count) {
    *count = devices();
    return 0;
}
Result cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}
Result cuDeviceGetName(char *text, int length, int device) {
    snprintf(text, length, NULLGPU_NAME);
    return 0;
}
Result cuDeviceGetAttribute(int *value, int which, int device) {
    *value = nullgpu_attribute(which);
    return 0;
}
Result cuDeviceGetUuid(char *uuid, int device) {
    memset(uuid, device + 1, 16);
    return 0;
}
Result cuDeviceGetUuid_v2(char *uuid, int device) { return cuDeviceGetUuid(uuid, device); }
Result cuDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", device + 1);
    return 0;
}
Result cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = NULLGPU_MEMORY;
    return 0;
}
Result cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    *free_bytes = *total = NULLGPU_MEMORY;
    return 0;
}
Result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    int *known = (int *)dlsym(RTLD_DEFAULT, "nullgpu_active");
    *flags = 0;
    *active = known ? known[device] : 0;
    return 0;
}
Result cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = CONTEXT;
    return 0;
}
Result cuCtxGetCurrent(void **context) {
    *context = CONTEXT;
    return 0;
}
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetDevice(int *device) {
    *device = 0;
    return 0;
}
Result cuCtxGetLimit(size_t *value, int which) {
    *value = 0;
    return 0;
}
Result cuCtxSetLimit(int which, size_t value) { return 0; }
Result cuCtxSynchronize(void) { return 0; }
Result cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}
Result cuGetErrorString(Result error, const char **text) {
    *text = "an error of the null driver";
    return 0;
}
Result cuGetErrorName(Result error, const char **text) { return cuGetErrorString(error, text); }

Result cuModuleLoadData(void **module, const void *image) { return made(module); }
Result cuModuleLoadDataEx(void **module, const void *image, unsigned n, void *options, void **values) {
    return made(module);
}
Result cuModuleLoad(void **module, const char *file) { return made(module); }
Result cuModuleUnload(void *module) { return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { return made(function); }
Result cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned n, void *c, void *d, unsigned m) {
    return made(library);
}
Result cuLibraryGetKernel(void **kernel, void *library, const char *name) { return made(kernel); }
Result cuLibraryGetModule(void **module, void *library) { return made(module); }
Result cuKernelGetFunction(void **function, void *kernel) { return made(function); }
Result cuFuncGetAttribute(int *value, int which, void *function) {
    *value = which == 0 ? 1024 : which == 4 ? 64 : 0; /* threads a block; registers; no spills, no static memory */
    return 0;
}
Result cuFuncSetAttribute(void *function, int which, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared) {
    *blocks = 2;
    return 0;
}
Result cuOccupancyMaxActiveClusters(int *clusters, void *function, void *config) {
    *clusters = 2;
    return 0;
}
static Result launched(void) {
    nullgpu_triton++;
    return 0;
}
Result cuLaunchKernel() { return launched(); }
Result cuLaunchKernelEx() { return launched(); }
Result cuLaunchCooperativeKernel() { return launched(); }
Result cuTensorMapEncodeTiled() { return 0; }

Result cuPointerGetAttribute(void *value, int which, unsigned long long pointer) {
    if (which == 3) /* the device's own address */
        *(unsigned long long *)value = pointer;
    else
        *(int *)value = 0;
    return 0;
}
static Result allocated(void **pointer, size_t bytes) {
    *pointer = calloc(1, bytes);
    return 0;
}
Result cuMemAlloc_v2(void **pointer, size_t bytes) { return allocated(pointer, bytes); }
Result cuMemAllocHost_v2(void **pointer, size_t bytes) { return allocated(pointer, bytes); }
Result cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) { return allocated(pointer, bytes); }
Result cuMemGetAllocationGranularity(size_t *bytes, void *properties, int option) {
    *bytes = 2 << 20;
    return 0;
}
Result cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return made(stream); }
Result cuStreamCreate(void **stream, unsigned flags) { return made(stream); }
Result cuEventCreate(void **event, unsigned flags) { return made(event); }
Result cuLinkCreate_v2() { return 0; }
Result cuLinkAddData_v2() { return 0; }
Result cuLinkComplete() { return 0; }

/* Undocumented tables of functions, each of which does nothing. */
Result cuGetExportTable(const void **functions, const void *id) {
    static void *table[512];
    table[0] = (void *)(sizeof table);
    for (int i = 1; i < 512; i++) table[i] = (void *)cuStub;
    *functions = table;
    return 0;
}
Result cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
    char newer[256];
    snprintf(newer, sizeof newer, "%s_v2", name);
    void *found = dlsym(RTLD_DEFAULT, newer);
    if (!found) found = dlsym(RTLD_DEFAULT, name);
    if (!found && getenv("NULLGPU_LOG")) fprintf(stderr, "the null driver has no %s\n", name);
    *function = found ? found : (void *)cuStub;
    if (status) *status = 0;
    return 0;
}
Result cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
