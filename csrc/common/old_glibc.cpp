// Lets a module that is built on a newer system run on one with glibc 2.28 (manylinux_2_28: Debian 10, RHEL 8, Ubuntu
// 20.04 and everything later).
//
// A linker binds a function to its newest version. glibc 2.34 moved threads, semaphores and dlopen from libraries of
// their own into libc.so.6 and gave them a new version there, 2.29 did so with exp, exp2 and log2 for what they do to
// errno; the old versions stay, and behave alike. So this file defines what the module, and the CUDA runtime and C++
// library in it, call by those names: a jump to the old version, seen in this module alone. On an older system the old
// versions are in libdl, libpthread and librt, which the module therefore names (CMakeLists.txt).
//
// A test reads the versions that the module asks for (tests/package/test_wheel.py): what is missing here fails it.

#include <sys/random.h>

#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__)
#define TOPGATHER_JUMP(target) "  jmp *" target "@GOTPCREL(%rip)\n"
#define TOPGATHER_FIRST_VERSION "GLIBC_2.2.5"
#define TOPGATHER_DLMOPEN_VERSION "GLIBC_2.3.4"
#elif defined(__aarch64__)
#define TOPGATHER_JUMP(target)         \
  "  adrp x16, :got:" target           \
  "\n"                                 \
  "  ldr x16, [x16, :got_lo12:" target \
  "]\n"                                \
  "  br x16\n"
#define TOPGATHER_FIRST_VERSION "GLIBC_2.17"
#define TOPGATHER_DLMOPEN_VERSION "GLIBC_2.17"
#else
#error "which version of glibc was the first on this processor?"
#endif

// `name` jumps to what the C library had as `old` in this version.
#define TOPGATHER_OLD_FUNCTION(name, old, version)                                                         \
  asm(".symver topgather_old_" #name ", " #old "@" version                                                 \
      "\n"                                                                                                 \
      "  .text\n"                                                                                          \
      "  .globl " #name                                                                                    \
      "\n"                                                                                                 \
      "  .hidden " #name                                                                                   \
      "\n"                                                                                                 \
      "  .type " #name ", %function\n" #name ":\n" TOPGATHER_JUMP("topgather_old_" #name) "  .size " #name \
                                                                                          ", . - " #name "\n");
#define TOPGATHER_OLD(name) TOPGATHER_OLD_FUNCTION(name, name, TOPGATHER_FIRST_VERSION)

TOPGATHER_OLD(dlclose)
TOPGATHER_OLD(dlerror)
TOPGATHER_OLD_FUNCTION(dlmopen, dlmopen, TOPGATHER_DLMOPEN_VERSION)
TOPGATHER_OLD(dlopen)
TOPGATHER_OLD(dlsym)
TOPGATHER_OLD(dlvsym)
TOPGATHER_OLD(exp)
TOPGATHER_OLD(exp2)
TOPGATHER_OLD(log2)
TOPGATHER_OLD(pthread_condattr_setpshared)
TOPGATHER_OLD(pthread_create)
TOPGATHER_OLD(pthread_detach)
TOPGATHER_OLD(pthread_getspecific)
TOPGATHER_OLD(pthread_join)
TOPGATHER_OLD(pthread_key_create)
TOPGATHER_OLD(pthread_key_delete)
TOPGATHER_OLD(pthread_kill)
TOPGATHER_OLD(pthread_mutex_trylock)
TOPGATHER_OLD(pthread_mutexattr_destroy)
TOPGATHER_OLD(pthread_mutexattr_init)
TOPGATHER_OLD(pthread_mutexattr_setpshared)
TOPGATHER_OLD(pthread_mutexattr_settype)
TOPGATHER_OLD(pthread_once)
TOPGATHER_OLD(pthread_rwlock_destroy)
TOPGATHER_OLD(pthread_rwlock_init)
TOPGATHER_OLD(pthread_rwlock_rdlock)
TOPGATHER_OLD(pthread_rwlock_timedrdlock)
TOPGATHER_OLD(pthread_rwlock_timedwrlock)
TOPGATHER_OLD(pthread_rwlock_tryrdlock)
TOPGATHER_OLD(pthread_rwlock_trywrlock)
TOPGATHER_OLD(pthread_rwlock_unlock)
TOPGATHER_OLD(pthread_rwlock_wrlock)
TOPGATHER_OLD(pthread_rwlockattr_destroy)
TOPGATHER_OLD(pthread_rwlockattr_init)
TOPGATHER_OLD(pthread_rwlockattr_setpshared)
TOPGATHER_OLD(pthread_setspecific)
TOPGATHER_OLD(pthread_spin_destroy)
TOPGATHER_OLD(pthread_spin_init)
TOPGATHER_OLD(pthread_spin_lock)
TOPGATHER_OLD(pthread_spin_trylock)
TOPGATHER_OLD(pthread_spin_unlock)
TOPGATHER_OLD(sem_destroy)
TOPGATHER_OLD(sem_init)
TOPGATHER_OLD(sem_post)
TOPGATHER_OLD(sem_timedwait)
TOPGATHER_OLD(sem_trywait)
TOPGATHER_OLD(sem_wait)
TOPGATHER_OLD(shm_open)
TOPGATHER_OLD(shm_unlink)

// From 2.38 on, which a C++ library built there calls: those of C23, which take 0b101 for a number too.
TOPGATHER_OLD_FUNCTION(__isoc23_strtol, strtol, TOPGATHER_FIRST_VERSION)
TOPGATHER_OLD_FUNCTION(__isoc23_strtoll, strtoll, TOPGATHER_FIRST_VERSION)
TOPGATHER_OLD_FUNCTION(__isoc23_strtoul, strtoul, TOPGATHER_FIRST_VERSION)
TOPGATHER_OLD_FUNCTION(__isoc23_strtoull, strtoull, TOPGATHER_FIRST_VERSION)

extern "C" {

// Whether the process has had one thread so far, from 2.32 on: no is always right, and costs the C++ library's counters
// of references an atomic instruction.
[[gnu::visibility("hidden")]] char __libc_single_threaded = 0;

// From 2.36 on. The C++ library's std::random_device, which is linked in as a whole, may ask for it.
[[gnu::visibility("hidden")]] uint32_t arc4random() {
  uint32_t bits = 0;
  if (getrandom(&bits, sizeof(bits), 0) != static_cast<ssize_t>(sizeof(bits))) std::abort();
  return bits;
}

}  // extern "C"
