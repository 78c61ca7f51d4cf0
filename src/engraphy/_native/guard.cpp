// A page of a mapped file can be missing: the file was truncated, or the disk cannot read the page
// or has no room for it. The instruction that touches such a page raises SIGBUS, which ends the
// process. The handler here checks if the address lies in one of our mappings. If so, it replaces
// the whole mapping by zero pages, notes the damage, and lets the instruction run again. Readers
// and writers ask for damage before they believe what they did. The handler replaces the whole
// mapping, not one page: a large batch would meet many missing pages, each would become a mapping
// of its own, and a process has a limited number of mappings.
//
// The handler takes no lock. A slot's version is odd while the slot changes, and a reader that
// finds it odd or changed does not use what it read. A caller keeps memory mapped while it touches
// it, so the slot with the address of a fault cannot vanish.
#include "guard.hpp"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>

namespace engraphy {
namespace {

constexpr int64_t armed_for = 50'000'000;  // nanoseconds
constexpr int slot_count = 1 << 16;  // about as many mappings as Linux allows a process

struct Slot {
    std::atomic<bool> taken;
    std::atomic<bool> damaged;
    std::atomic<bool> writable;
    std::atomic<uint32_t> version;
    std::atomic<uintptr_t> begin, size;
};

Slot slots[slot_count];  // zero, and without memory until used
std::atomic<int> slots_used{0};
std::atomic<int64_t> damages{0};
std::atomic<int64_t> armed_until{0};
std::atomic<bool> passing_on{false};
struct sigaction previous;

Slot *slot_of(uintptr_t address) {
    for (int i = 0; i < slots_used.load(); i++) {
        Slot &slot = slots[i];
        const uint32_t version = slot.version.load();
        const uintptr_t begin = slot.begin.load(), size = slot.size.load();
        if (address - begin < size && !(version & 1) && slot.version.load() == version)
            return &slot;
    }
    return nullptr;
}

bool replaced(Slot &slot) {
    slot.damaged = true;
    damages++;
    const int access = PROT_READ | (slot.writable ? PROT_WRITE : 0);
    const int how = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    return mmap((void *)slot.begin.load(), slot.size, access, how, -1, 0) != MAP_FAILED;
}

// What would have happened without us. A handler that raises the signal again, as faulthandler
// does, or that was installed over ours and calls it in turn, is not called twice: the second time
// the process ends.
void pass_on(int signal, siginfo_t *info, void *context) {
    const auto plain = previous.sa_handler;
    if (!passing_on.exchange(true)) {
        if (plain == SIG_IGN && info->si_code <= 0) {  // of a fault it cannot be ignored
            passing_on = false;
            return;
        }
        if (plain != SIG_IGN && plain != SIG_DFL) {
            if (previous.sa_flags & SA_SIGINFO) previous.sa_sigaction(signal, info, context);
            else plain(signal);
            sigset_t pending;
            if (!sigpending(&pending) && !sigismember(&pending, signal)) passing_on = false;
            return;
        }
    }
    struct sigaction none = {};
    none.sa_handler = SIG_DFL;
    sigaction(signal, &none, nullptr);
    if (info->si_code <= 0) raise(signal);  // else the instruction repeats
}

void on_fault(int signal, siginfo_t *info, void *context) {
    const int before = errno;
    Slot *slot = info->si_code > 0 ? slot_of((uintptr_t)info->si_addr)
                                   : nullptr;  // above 0: from the kernel
    if (!slot || !replaced(*slot)) pass_on(signal, info, context);
    errno = before;
}

}  // namespace

void arm_guard() {
    struct sigaction current, ours = {};
    if (sigaction(SIGBUS, nullptr, &current) ||
        ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_fault))
        return;
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigemptyset(&ours.sa_mask);
    previous = current;
    sigaction(SIGBUS, &ours, nullptr);
}

void keep_guard_armed() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    const int64_t now = time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
    if (now < armed_until.load(std::memory_order_relaxed)) return;
    arm_guard();
    armed_until.store(now + armed_for, std::memory_order_relaxed);
}

int guard(uintptr_t begin, uintptr_t size, bool writable) {
    arm_guard();
    for (int i = 0; i < slot_count; i++) {
        Slot &slot = slots[i];
        if (slot.taken.exchange(true)) continue;
        slot.version++;
        slot.begin = begin;
        slot.size = size;
        slot.writable = writable;
        slot.damaged = false;
        slot.version++;
        for (int used = slots_used.load();
             used <= i && !slots_used.compare_exchange_weak(used, i + 1);) {}
        return i;
    }
    return -1;
}

void unguard(int number) {
    Slot &slot = slots[number];
    slot.version++;
    slot.size = 0;
    slot.version++;
    slot.taken = false;
}

uint32_t version_of(int slot) { return slots[slot].version; }
bool damaged(int slot) { return slots[slot].damaged; }
int64_t damage_count() { return damages; }

}  // namespace engraphy
