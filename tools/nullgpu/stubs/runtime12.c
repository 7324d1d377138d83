/* libcudart.so.12, which xformers' library asks for by that name: registration of its kernels, which is all that the
   preloaded runtime leaves to the real one. */
static void *registered;
void **__cudaRegisterFatBinary(void *binary) { return &registered; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *a,
                            void *b, void *c, void *d, int *size) {}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, unsigned long size,
                       int constant, int global) {}
char __cudaInitModule(void **handle) { return 1; }
