// Mapped files that shrink, or cannot be read, while they are served: the fault is caught and
// noted.
#pragma once

#include <stdint.h>

namespace engraphy {

// Watches a mapping of a file. Returns its slot, -1 if there are too many.
int guard(uintptr_t begin, uintptr_t size, bool writable);

// To be called before it is unmapped.
void unguard(int slot);

// Whether a fault was met in it since; its memory then is zero, all of it.
bool damaged(int slot);

// Changes when a slot is given to another mapping, or to none.
uint32_t version_of(int slot);

// Faults that were met in guarded mappings of this process.
int64_t damage_count();

// Put the handler before one that was installed over it since.
void arm_guard();

// `arm_guard`, unless this was called within the last 50 ms.
void keep_guard_armed();

// Whether the byte shows that its file was not cut. No matter where a file is cut, its last byte is
// gone, which is a fault that counts as damage, or zero. A byte that is zero shows nothing: then
// the file's size has to be asked for.
inline bool ends_whole(uintptr_t last_byte) { return *(const volatile uint8_t *)last_byte != 0; }

}  // namespace engraphy
