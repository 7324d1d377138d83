/* Memory of the null device: pages of the host that are not touched until something is copied. */
#define _GNU_SOURCE
#include "cuda_runtime_api.h"
#include "null.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

long nullgpu_allocations, nullgpu_used, nullgpu_peak, nullgpu_uploads, nullgpu_waits;

typedef struct Block {
    void *start;
    size_t bytes;
    int on_host;
    struct Block *next;
} Block;

static Block *blocks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Copies above these sizes are left out: nothing reads what was never computed. */
static const size_t LARGEST_ON_DEVICE = 1 << 20, LARGEST_TO_HOST = 8 << 20;

static void *reserve(size_t bytes, int on_host) {
    bytes = bytes ? bytes : 1;
    void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return NULL;
    Block *block = malloc(sizeof *block);
    *block = (Block){start, bytes, on_host, NULL};
    pthread_mutex_lock(&lock);
    block->next = blocks;
    blocks = block;
    if (!on_host && (nullgpu_used += bytes) > nullgpu_peak) nullgpu_peak = nullgpu_used;
    pthread_mutex_unlock(&lock);
    return start;
}

static void release(void *start) {
    pthread_mutex_lock(&lock);
    Block **here = &blocks;
    while (*here && (*here)->start != start) here = &(*here)->next;
    if (*here) {
        Block *block = *here;
        *here = block->next;
        munmap(block->start, block->bytes);
        if (!block->on_host) nullgpu_used -= block->bytes;
        free(block);
    }
    pthread_mutex_unlock(&lock);
}

/* 0 on the device, 1 pinned on the host, -1 unknown to CUDA. */
static int where(const void *pointer) {
    int found = -1;
    pthread_mutex_lock(&lock);
    for (Block *block = blocks; block; block = block->next) {
        const char *start = block->start;
        if ((const char *)pointer >= start && (const char *)pointer < start + block->bytes) {
            found = block->on_host;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static void copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDeviceToDevice && bytes > LARGEST_ON_DEVICE) return;
    if (kind == cudaMemcpyDeviceToHost && bytes > LARGEST_TO_HOST) return;
    memcpy(to, from, bytes);
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    *pointer = nullgpu_used + bytes > NULLGPU_MEMORY * nullgpu_devices() ? NULL : reserve(bytes, 0);
    nullgpu_allocations++;
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *pointer) {
    if (pointer) release(pointer);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    *pointer = reserve(bytes, 1);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void *pointer) {
    release(pointer);
    return cudaSuccess;
}
long ncclMemAlloc(void **pointer, size_t bytes) {
    *pointer = reserve(bytes, 0);
    return 0;
}
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    *pointer = reserve(1 << 16, 0);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = NULLGPU_MEMORY;
    *free_bytes = NULLGPU_MEMORY - (size_t)nullgpu_used;
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (kind == cudaMemcpyHostToDevice) nullgpu_uploads++;
    copy(to, from, bytes, kind);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    nullgpu_waits++;
    copy(to, from, bytes, kind);
    return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t bytes, cudaStream_t stream) {
    copy(to, from, bytes, cudaMemcpyDeviceToDevice);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        memcpy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}
/* Fresh pages are zero already, so large blocks are not written with zeros. */
cudaError_t cudaMemsetAsync(void *start, int value, size_t bytes, cudaStream_t stream) {
    if (bytes <= LARGEST_ON_DEVICE || value) memset(start, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *start, int value, size_t bytes) { return cudaMemsetAsync(start, value, bytes, NULL); }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
    memset(found, 0, sizeof *found);
    int kind = where(pointer);
    found->type = kind == 0 ? cudaMemoryTypeDevice : kind == 1 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    found->devicePointer = found->hostPointer = (void *)pointer;
    return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value) {
    *(unsigned long long *)value = 0;
    return cudaSuccess;
}
