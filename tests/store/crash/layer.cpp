// Stands between a process and the kernel (LD_PRELOAD), and watches one folder: it numbers the
// calls that change what lies below, appends each that took place to a journal, and kills the
// process at the call of a chosen number, before it or with half of its bytes written.
//
// What is synced is recorded, and does not go to the disk: SIGKILL leaves the page cache alone,
// and what a power cut leaves is computed from the journal (power_cut.py). Paths come from the
// kernel (/proc/self/fd) or are taken as given; the folder holds no links and nobody uses "..".
//
// SQLite's "-shm" file is let through: it is mapped memory, made anew at recovery.

#include <climits>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include <fcntl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

// As in journal.py.
enum class Op : uint8_t {
    note = 0,
    create = 1,
    write = 2,
    truncate = 3,
    sync = 4,
    rename = 5,
    unlink = 6,
    mkdir = 7,
    rmdir = 8,
};

struct __attribute__((packed)) Header {
    uint64_t call;
    int64_t offset;
    uint32_t path_bytes;
    uint32_t data_bytes;
    Op op;
};

// Constant until constructors ran: other libraries' constructors call through here before.
std::mutex lock;
char folder[PATH_MAX];
size_t folder_bytes = 0;
int journal = -1;
uint64_t calls = 0;
uint64_t kill_at = 0;
bool kill_inside = false;

[[noreturn]] void give_up(const char *what, const std::string &path) {
    dprintf(STDERR_FILENO, "crash layer: %s: %s\n", what, path.c_str());
    abort();
}

[[noreturn]] void die() {
    kill(getpid(), SIGKILL);
    for (;;) {
        pause();
    }
}

bool armed() { return folder_bytes != 0; }

bool watched(const std::string &path) {
    static const std::string unwatched = "-shm";
    if (path.compare(0, folder_bytes, folder) != 0) {
        return false;
    }
    if (path.size() > folder_bytes && path[folder_bytes] != '/') {
        return false;
    }
    return path.size() < unwatched.size() ||
           path.compare(path.size() - unwatched.size(), unwatched.size(), unwatched) != 0;
}

std::string path_of(int descriptor) {
    char link[64];
    char path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path);
    return size < 0 ? std::string() : std::string(path, size);
}

std::string path_at(int directory, const char *path) {
    if (path[0] == '/') {
        return path;
    }
    if (directory != AT_FDCWD) {
        return path_of(directory) + "/" + path;
    }
    char current[PATH_MAX];
    return getcwd(current, sizeof current) == nullptr ? std::string()
                                                      : std::string(current) + "/" + path;
}

std::string inside(const std::string &path) {
    return path.size() > folder_bytes ? path.substr(folder_bytes + 1) : std::string();
}

void append(uint64_t call, Op op, const std::string &path, int64_t offset, const void *data,
            size_t data_bytes) {
    Header header{call, offset, static_cast<uint32_t>(path.size()),
                  static_cast<uint32_t>(data_bytes), op};
    iovec parts[] = {{&header, sizeof header},
                     {const_cast<char *>(path.data()), path.size()},
                     {const_cast<void *>(data), data_bytes}};
    ssize_t whole = sizeof header + path.size() + data_bytes;
    if (syscall(SYS_writev, journal, parts, 3) != whole) {
        give_up("the journal cannot be written", path);
    }
}

// One call that changes something. While it lives, no other is made: the journal's order is
// the order of the changes.
class Change {
  public:
    explicit Change(bool divisible = false) : held_(lock), number_(++calls) {
        if (number_ == kill_at && !(divisible && kill_inside)) {
            die();
        }
    }

    bool last() const { return number_ == kill_at; }

    void record(Op op, const std::string &path, int64_t offset = 0, const void *data = nullptr,
                size_t data_bytes = 0) const {
        append(number_, op, inside(path), offset, data, data_bytes);
        if (last()) {
            die();
        }
    }

  private:
    std::lock_guard<std::mutex> held_;
    uint64_t number_;
};

int open_file(int directory, const char *path, int flags, mode_t mode) {
    auto real = [&] { return syscall(SYS_openat, directory, path, flags, mode); };
    if (!armed() || !(flags & (O_CREAT | O_TRUNC))) {
        return real();
    }
    std::string full = path_at(directory, path);
    if (!watched(full)) {
        return real();
    }
    bool exists = syscall(SYS_faccessat, AT_FDCWD, full.c_str(), F_OK) == 0;
    if (exists && !(flags & O_TRUNC)) {
        return real();
    }
    Change change;
    int descriptor = real();
    if (descriptor >= 0) {
        change.record(exists ? Op::truncate : Op::create, full);
    }
    return descriptor;
}

// `offset` is in the file, and kept there by the caller; -1: the descriptor's own.
template <typename Real>
ssize_t write_file(int descriptor, size_t size, int64_t offset, const void *data, Real real) {
    std::string path = armed() ? path_of(descriptor) : std::string();
    if (!armed() || !watched(path)) {
        return real(size);
    }
    Change change(true);
    if (offset < 0) {
        bool appends = fcntl(descriptor, F_GETFL) & O_APPEND;
        offset = lseek64(descriptor, 0, appends ? SEEK_END : SEEK_CUR);
    }
    ssize_t done = real(change.last() ? size / 2 : size);
    if (done > 0) {
        std::string copied;
        if (data == nullptr) {  // the kernel copied it from another file
            copied.resize(done);
            int reader = syscall(SYS_openat, AT_FDCWD, path.c_str(), O_RDONLY);
            if (reader < 0 || pread64(reader, copied.data(), done, offset) != done) {
                give_up("what was copied cannot be read back", path);
            }
            close(reader);
            data = copied.data();
        }
        change.record(Op::write, path, offset, data, done);
    }
    if (change.last()) {
        die();
    }
    return done;
}

template <typename Real>
int change_entry(Op op, int directory, const char *path, Real real) {
    std::string full = armed() ? path_at(directory, path) : std::string();
    if (!armed() || !watched(full)) {
        return real();
    }
    Change change;
    int result = real();
    if (result == 0) {
        change.record(op, full);
    }
    return result;
}

// Within one folder that is watched, or outside of all: the journal could not tell the rest.
int rename_entry(int from, const char *old_path, int to, const char *new_path, unsigned flags) {
    auto real = [&] { return syscall(SYS_renameat2, from, old_path, to, new_path, flags); };
    if (!armed()) {
        return real();
    }
    std::string old_full = path_at(from, old_path);
    std::string new_full = path_at(to, new_path);
    if (!watched(old_full) && !watched(new_full)) {
        return real();
    }
    if (!watched(old_full) || !watched(new_full)) {
        give_up("moved over the border of the watched folder", old_full);
    }
    Change change;
    int result = real();
    if (result == 0) {
        std::string target = inside(new_full);
        change.record(Op::rename, old_full, 0, target.data(), target.size());
    }
    return result;
}

int truncate_file(int descriptor, off64_t size) {
    auto real = [&] { return syscall(SYS_ftruncate, descriptor, size); };
    std::string path = armed() ? path_of(descriptor) : std::string();
    if (!armed() || !watched(path)) {
        return real();
    }
    Change change;
    int result = real();
    if (result == 0) {
        change.record(Op::truncate, path, size);
    }
    return result;
}

int sync_file(int descriptor, long number) {
    std::string path = armed() ? path_of(descriptor) : std::string();
    if (!armed() || !watched(path)) {
        return syscall(number, descriptor);
    }
    Change change;
    change.record(Op::sync, path);
    return 0;
}

mode_t mode_of(int flags, va_list arguments) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
}

}  // namespace

extern "C" {

// Watch a folder from now on; `at` 0 kills nothing, `within` writes half of the chosen write.
void crash_layer_arm(const char *path, const char *journal_path, uint64_t at, int within) {
    journal = syscall(SYS_openat, AT_FDCWD, journal_path,
                      O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
    if (journal < 0) {
        give_up("the journal cannot be opened", journal_path);
    }
    snprintf(folder, sizeof folder, "%s", path);
    calls = 0;
    kill_at = at;
    kill_inside = within != 0;
    folder_bytes = strlen(folder);
}

// Put a note between the calls, in the order in which they happened.
void crash_layer_note(const char *text) {
    std::lock_guard<std::mutex> held(lock);
    append(calls, Op::note, std::string(), 0, text, strlen(text));
}

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        va_list arguments;                                                                         \
        va_start(arguments, flags);                                                                \
        mode_t mode = mode_of(flags, arguments);                                                   \
        va_end(arguments);                                                                         \
        return open_file(AT_FDCWD, path, flags, mode);                                             \
    }
#define OPENAT(name)                                                                               \
    int name(int directory, const char *path, int flags, ...) {                                    \
        va_list arguments;                                                                         \
        va_start(arguments, flags);                                                                \
        mode_t mode = mode_of(flags, arguments);                                                   \
        va_end(arguments);                                                                         \
        return open_file(directory, path, flags, mode);                                            \
    }
#define PWRITE(name)                                                                               \
    ssize_t name(int descriptor, const void *data, size_t size, off64_t offset) {                  \
        return write_file(descriptor, size, offset, data, [&](size_t part) {                       \
            return syscall(SYS_pwrite64, descriptor, data, part, offset);                          \
        });                                                                                        \
    }
#define FTRUNCATE(name)                                                                            \
    int name(int descriptor, off64_t size) noexcept { return truncate_file(descriptor, size); }
#define SENDFILE(name)                                                                             \
    ssize_t name(int to, int from, off64_t *offset, size_t size) noexcept {                        \
        return write_file(to, size, -1, nullptr, [&](size_t part) {                                \
            return syscall(SYS_sendfile, to, from, offset, part);                                  \
        });                                                                                        \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
PWRITE(pwrite)
PWRITE(pwrite64)
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)
SENDFILE(sendfile)
SENDFILE(sendfile64)

ssize_t write(int descriptor, const void *data, size_t size) {
    return write_file(descriptor, size, -1, data, [&](size_t part) {
        return syscall(SYS_write, descriptor, data, part);
    });
}

ssize_t copy_file_range(int from, off64_t *from_offset, int to, off64_t *to_offset, size_t size,
                        unsigned flags) {
    return write_file(to, size, to_offset == nullptr ? -1 : *to_offset, nullptr, [&](size_t part) {
        return syscall(SYS_copy_file_range, from, from_offset, to, to_offset, part, flags);
    });
}

int fsync(int descriptor) { return sync_file(descriptor, SYS_fsync); }

int fdatasync(int descriptor) { return sync_file(descriptor, SYS_fdatasync); }

int rename(const char *old_path, const char *new_path) noexcept {
    return rename_entry(AT_FDCWD, old_path, AT_FDCWD, new_path, 0);
}

int renameat(int from, const char *old_path, int to, const char *new_path) noexcept {
    return rename_entry(from, old_path, to, new_path, 0);
}

int renameat2(int from, const char *old_path, int to, const char *new_path,
              unsigned flags) noexcept {
    return rename_entry(from, old_path, to, new_path, flags);
}

int unlink(const char *path) noexcept {
    return change_entry(Op::unlink, AT_FDCWD, path,
                        [&] { return syscall(SYS_unlinkat, AT_FDCWD, path, 0); });
}

int unlinkat(int directory, const char *path, int flags) noexcept {
    return change_entry(flags & AT_REMOVEDIR ? Op::rmdir : Op::unlink, directory, path,
                        [&] { return syscall(SYS_unlinkat, directory, path, flags); });
}

int rmdir(const char *path) noexcept {
    return change_entry(Op::rmdir, AT_FDCWD, path,
                        [&] { return syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR); });
}

int mkdir(const char *path, mode_t mode) noexcept {
    return change_entry(Op::mkdir, AT_FDCWD, path,
                        [&] { return syscall(SYS_mkdirat, AT_FDCWD, path, mode); });
}

int mkdirat(int directory, const char *path, mode_t mode) noexcept {
    return change_entry(Op::mkdir, directory, path,
                        [&] { return syscall(SYS_mkdirat, directory, path, mode); });
}

}  // extern "C"
