/* The CUDA runtime without a device: it answers success to everything and launches nothing. */
#define _GNU_SOURCE
#include "cuda_runtime_api.h"
#include "null.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

long nullgpu_aten;
int nullgpu_active[64]; /* devices on which a context would exist; the driver's stub reads it */
static __thread int current;

int nullgpu_devices(void) {
    const char *asked = getenv("NULLGPU_DEVICES");
    return asked ? atoi(asked) : 1;
}

/* Devices and versions. NULLGPU_LOG=1 says who sets which device: a thread that sets none works on device 0. */
cudaError_t cudaGetDeviceCount(int *count) {
    *count = nullgpu_devices();
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
    *device = current;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (getenv("NULLGPU_LOG")) {
        const char *thread = (long)getpid() == syscall(SYS_gettid) ? "main" : "another";
        fprintf(stderr, "cudaSetDevice(%d) in the %s thread of %d\n", device, thread, (int)getpid());
    }
    current = device;
    nullgpu_active[device] = 1;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = NULLGPU_CUDA;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = NULLGPU_CUDA;
    return cudaSuccess;
}
const char *cudaGetErrorString(cudaError_t error) { return "an error of the null GPU"; }
const char *cudaGetErrorName(cudaError_t error) { return "nullGpuError"; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, NULLGPU_NAME);
    p->totalGlobalMem = NULLGPU_MEMORY;
    p->major = 9;
    p->multiProcessorCount = NULLGPU_SMS;
    p->l2CacheSize = NULLGPU_L2;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerBlock = p->regsPerMultiprocessor = NULLGPU_REGISTERS;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = NULLGPU_SHARED_PER_BLOCK;
    p->sharedMemPerMultiprocessor = NULLGPU_SHARED_PER_SM;
    p->textureAlignment = 512;
    p->totalConstMem = 65536;
    p->memoryBusWidth = 6144;
    p->asyncEngineCount = 3;
    p->concurrentKernels = p->unifiedAddressing = p->cooperativeLaunch = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int device) {
    return cudaGetDeviceProperties(p, device);
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    *value = nullgpu_attribute((int)which);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) {
    *can = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

/* Streams and events: handles that are told apart and nothing behind them. */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = (cudaStream_t)malloc(64);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}
/* One stream captures at a time. A graph holds nothing: what was launched into it was counted then. */
static int capturing;
static cudaStream_t captured;
static unsigned long long captures;
static enum cudaStreamCaptureStatus capture_of(cudaStream_t stream) {
    return capturing && stream == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    capturing = 1;
    captured = stream;
    captures++;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    capturing = 0;
    *graph = (cudaGraph_t)malloc(8);
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = capture_of(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    *status = capture_of(stream);
    if (id) *id = *status == cudaStreamCaptureStatusActive ? captures : 0;
    if (count) *count = 0;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    *made = (cudaGraphExec_t)malloc(8);
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = 1; /* PyTorch warns of an empty graph */
    return cudaSuccess;
}
static cudaError_t wait(void) {
    nullgpu_waits++;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait(); }
cudaError_t cudaDeviceSynchronize(void) { return wait(); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait(); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = (cudaEvent_t)malloc(8);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
/* About a millisecond, and each a little longer than the one before: a tuner takes the first candidate, every time. */
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    static long asked;
    *milliseconds = 1.0f + (float)asked++ * 1e-6f;
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *with) {
    call(with);
    return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *with, unsigned flags) {
    call(stream, cudaSuccess, with);
    return cudaSuccess;
}

/* Kernels of PyTorch and xformers. */
static cudaError_t launched(void) {
    nullgpu_aten++;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *k, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return launched();
}
cudaError_t __cudaLaunchKernel(void *k, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return launched();
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *k, void **args) { return launched(); }
cudaError_t cudaLaunchCooperativeKernel(const void *k, dim3 grid, dim3 block, void **args, size_t shared,
                                        cudaStream_t stream) {
    return launched();
}
cudaError_t __cudaGetKernel(void **kernel, const void *function) {
    *kernel = (void *)function;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->maxDynamicSharedSizeBytes = NULLGPU_SHARED_PER_BLOCK;
    found->binaryVersion = found->ptxVersion = 90;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads,
                                                          size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}

/* <<<grid, block>>> pushes its configuration here and the compiled launcher pops it. */
static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configurations[16];
static __thread int depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configurations[depth].grid = grid;
    configurations[depth].block = block;
    configurations[depth].shared = shared;
    configurations[depth++].stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configurations[--depth].grid;
    *block = configurations[depth].block;
    *shared = configurations[depth].shared;
    *(void **)stream = configurations[depth].stream;
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
    *function = driver ? dlsym(driver, name) : NULL;
    if (driver && !*function) *function = dlsym(driver, "cuStub");
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *result) {
    return cudaGetDriverEntryPointByVersion(name, function, 0, flags, result);
}
