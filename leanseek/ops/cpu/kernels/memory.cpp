// Where the pages of memory lie, on a machine with several memory nodes.
#include <cerrno>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels.h"

// Deals the pages of [start, start + bytes), none of them touched yet, out over the nodes whose bits are set in
// mask[nodes / 64 + 1]. outcome: 0; -1 where the process was started with a policy of its own (numactl), which stays; else
// errno. The system calls themselves, so that libnuma need not be there.
KERNEL interleave_pages(void* start, int64_t bytes, const int64_t* mask, int64_t nodes, int64_t* outcome) {
    constexpr int DEFAULT = 0, INTERLEAVE = 3;  // linux/mempolicy.h
    int policy = DEFAULT;
    if (syscall(SYS_get_mempolicy, &policy, nullptr, 0ul, nullptr, 0ul) == 0 && policy != DEFAULT) {
        *outcome = -1;
        return;
    }
    // the kernel takes the number of bits plus one
    const long failed = syscall(SYS_mbind, start, size_t(bytes), INTERLEAVE, mask, (unsigned long)nodes + 1, 0u);
    *outcome = failed ? errno : 0;
}
