//! The system calls that neither the C library nor `nix` wraps, each as one safe function.
//!
//! The mount functions are those of the kernel's mount API of file descriptors: a mount is made and configured
//! while it is attached nowhere, and attached to a place that was resolved before. No path is looked up twice.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::sys::signalfd::SignalFd;
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

type Result<T> = nix::Result<T>;

/// Bits of `mount_setattr(2)` and `fsmount(2)`; `linux/mount.h`.
pub mod attr {
    /// Read-only.
    pub const RDONLY: u64 = 0x1;
    /// Set-user-id bits and file capabilities have no effect.
    pub const NOSUID: u64 = 0x2;
    /// Device nodes can't be opened.
    pub const NODEV: u64 = 0x4;
    /// Programs can't be executed.
    pub const NOEXEC: u64 = 0x8;
    /// The field of access-time modes; 0 in it is `relatime`.
    pub const ATIME: u64 = 0x70;
    /// Access times are not updated.
    pub const NOATIME: u64 = 0x10;
    /// Access times are always updated.
    pub const STRICTATIME: u64 = 0x20;
    /// Access times of directories are not updated.
    pub const NODIRATIME: u64 = 0x80;
    /// Symbolic links are not followed.
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;
const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC as libc::c_uint;
const AT_RECURSIVE: libc::c_uint = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSCONFIG_CMD_RECONFIGURE: libc::c_uint = 7;
const FSPICK_CLOEXEC: libc::c_uint = 1;
const FSPICK_EMPTY_PATH: libc::c_uint = 8;

/// Too wide for the C library's type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct mount_attr` of `mount_setattr(2)`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// `struct open_how` of `openat2(2)`.
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// `struct clone_args` of `clone3(2)`, version 2 (up to `cgroup`).
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

fn owned(result: libc::c_long) -> Result<OwnedFd> {
    let fd = Errno::result(result)?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the system call has just returned this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn c_string(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|_| Errno::EINVAL)
}

/// Opens `path` as if `root` were the root directory: neither `..` nor a symbolic link leaves it, and magic links
/// of procfs are not followed.
pub fn open_in_root(root: BorrowedFd<'_>, path: &[u8], flags: OFlag) -> Result<OwnedFd> {
    open_resolving(
        root,
        path,
        flags,
        libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS,
    )
}

/// Opens `path` below a directory as a mere place (O_PATH): no symbolic link on the way is followed, and nothing leads out.
pub fn open_below(directory: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd> {
    let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS;
    open_resolving(directory, path, OFlag::O_PATH, resolve)
}

fn open_resolving(
    root: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlag,
    resolve: u64,
) -> Result<OwnedFd> {
    let path = c_string(path)?;
    let how = OpenHow {
        flags: (flags | OFlag::O_CLOEXEC).bits() as u64,
        mode: 0,
        resolve,
    };
    loop {
        // SAFETY: `path` and `how` live across the call, and the size is that of `how`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                root.as_raw_fd(),
                path.as_ptr(),
                &raw const how,
                size_of::<OpenHow>(),
            )
        };
        match owned(result) {
            // A rename somewhere raced with a `..`: openat2(2) says to try again.
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// A detached copy of the mount that `path` is on, with `path` as its root; with everything mounted below, if
/// `recursive`.
pub fn clone_tree(path: &CStr, recursive: bool) -> Result<OwnedFd> {
    clone_tree_at(AT_FDCWD.as_raw_fd(), path, recursive, 0)
}

/// [`clone_tree`] of an open file.
pub fn clone_tree_of(file: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd> {
    clone_tree_at(
        file.as_raw_fd(),
        c"",
        recursive,
        libc::AT_EMPTY_PATH as libc::c_uint,
    )
}

fn clone_tree_at(dir: RawFd, path: &CStr, recursive: bool, extra: libc::c_uint) -> Result<OwnedFd> {
    let recursive = if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: `path` lives across the call.
    owned(unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            dir,
            path.as_ptr(),
            OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recursive | extra,
        )
    })
}

/// Attaches a detached mount to an open file or directory.
pub fn attach(mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: both descriptors are borrowed across the call, and the paths are constants.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            place.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// Changes attributes and, if it is not 0, the propagation type (`MS_PRIVATE` and so on) of a mount.
pub fn set_attributes(
    mount: BorrowedFd<'_>,
    set: u64,
    clear: u64,
    propagation: libc::c_ulong,
    recursive: bool,
) -> Result<()> {
    mount_setattr(
        mount,
        &MountAttr {
            attr_set: set,
            attr_clr: clear,
            propagation,
            userns_fd: 0,
        },
        recursive,
    )
}

/// Maps the ids of a detached mount's files by a user namespace's maps. `EINVAL` if its file system can't be mapped.
pub fn map_ids(
    mount: BorrowedFd<'_>,
    user_namespace: BorrowedFd<'_>,
    recursive: bool,
) -> Result<()> {
    mount_setattr(
        mount,
        &MountAttr {
            attr_set: MOUNT_ATTR_IDMAP,
            userns_fd: user_namespace.as_raw_fd() as u64,
            ..Default::default()
        },
        recursive,
    )
}

fn mount_setattr(mount: BorrowedFd<'_>, attributes: &MountAttr, recursive: bool) -> Result<()> {
    let recursive = if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: `attributes` lives across the call, and the size is its own.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH as libc::c_uint | recursive,
            std::ptr::from_ref(attributes),
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// A file system being configured, before it is mounted.
#[derive(Debug)]
pub struct FsContext(OwnedFd);

impl FsContext {
    /// A new one of type `fs`; `ENODEV` if the kernel has no such type.
    pub fn open(fs: &str) -> Result<Self> {
        let fs = c_string(fs.as_bytes())?;
        // SAFETY: the name lives across the call.
        owned(unsafe { libc::syscall(libc::SYS_fsopen, fs.as_ptr(), FSOPEN_CLOEXEC) }).map(Self)
    }

    /// The one that is mounted at this place, to change it.
    pub fn pick(place: BorrowedFd<'_>) -> Result<Self> {
        // SAFETY: the path is a constant.
        owned(unsafe {
            libc::syscall(
                libc::SYS_fspick,
                place.as_raw_fd(),
                c"".as_ptr(),
                FSPICK_CLOEXEC | FSPICK_EMPTY_PATH,
            )
        })
        .map(Self)
    }

    /// Changes the file system that was picked.
    pub fn reconfigure(&self) -> Result<()> {
        self.config(FSCONFIG_CMD_RECONFIGURE, None, None)
    }

    /// Sets `key=value`, or the flag `key`.
    pub fn set(&self, key: &str, value: Option<&[u8]>) -> Result<()> {
        let key = c_string(key.as_bytes())?;
        let value = value.map(c_string).transpose()?;
        let command = if value.is_some() {
            FSCONFIG_SET_STRING
        } else {
            FSCONFIG_SET_FLAG
        };
        self.config(command, Some(&key), value.as_deref())
    }

    /// Makes the file system and a detached mount of it with these attributes ([`attr`]).
    pub fn mount(&self, attributes: u64) -> Result<OwnedFd> {
        self.config(FSCONFIG_CMD_CREATE, None, None)?;
        // SAFETY: touches no memory of ours.
        owned(unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.0.as_raw_fd(),
                FSMOUNT_CLOEXEC,
                attributes,
            )
        })
    }

    /// What the kernel has to say about the last failure, if it says anything.
    pub fn message(&self) -> Option<String> {
        let mut buffer = [0u8; 256];
        let length = nix::unistd::read(self.0.as_fd(), &mut buffer).ok()?;
        let text = String::from_utf8_lossy(buffer.get(..length)?);
        // "e tmpfs: Bad value for 'size'": the severity goes.
        let text = text.trim_end();
        Some(text.get(2..).unwrap_or(text).to_owned())
    }

    fn config(
        &self,
        command: libc::c_uint,
        key: Option<&CStr>,
        value: Option<&CStr>,
    ) -> Result<()> {
        // SAFETY: key and value live across the call; null is what the kernel wants for what is absent.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command,
                key.map_or(std::ptr::null(), CStr::as_ptr),
                value.map_or(std::ptr::null(), CStr::as_ptr),
                0,
            )
        })
        .map(drop)
    }
}

/// The two sides of a fork.
#[derive(Debug)]
pub enum Fork {
    /// In the new process.
    Child,
    /// In the old one.
    Parent {
        /// The child.
        pid: Pid,
        /// A descriptor for it, which no reuse of its pid can redirect.
        pidfd: OwnedFd,
    },
}

/// `fork(2)` into new namespaces (`CLONE_NEW*`) and, at once, into a cgroup.
///
/// # Safety
/// As with `fork`: the process must have a single thread, and the child must not return into code that shares
/// descriptors or other outside state with the parent.
pub unsafe fn fork_into(namespaces: u64, cgroup: BorrowedFd<'_>) -> Result<Fork> {
    // SAFETY: the caller's promise is this function's too.
    unsafe {
        fork_with(CloneArgs {
            flags: namespaces | CLONE_INTO_CGROUP,
            cgroup: cgroup.as_raw_fd() as u64,
            ..Default::default()
        })
    }
}

/// `fork(2)` into new namespaces, in the caller's cgroup.
///
/// # Safety
/// As with [`fork_into`].
pub unsafe fn fork_aside(namespaces: u64) -> Result<Fork> {
    // SAFETY: the caller's promise is this function's too.
    unsafe {
        fork_with(CloneArgs {
            flags: namespaces,
            ..Default::default()
        })
    }
}

unsafe fn fork_with(arguments: CloneArgs) -> Result<Fork> {
    let mut pidfd: RawFd = -1;
    let arguments = CloneArgs {
        flags: arguments.flags | libc::CLONE_PIDFD as u64,
        pidfd: (&raw mut pidfd) as u64,
        // The parent of a sibling hears of it as it hears of this process; the kernel wants that left out.
        exit_signal: if arguments.flags & libc::CLONE_PARENT as u64 == 0 {
            libc::SIGCHLD as u64
        } else {
            0
        },
        ..arguments
    };
    // SAFETY: without CLONE_VM and with no stack given this is fork(2); the arguments and `pidfd` live across the
    // call, and the size is that of the arguments. The rest is the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<CloneArgs>(),
        )
    };
    match Errno::result(result)? {
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent {
            pid: Pid::from_raw(i32::try_from(pid).map_err(|_| Errno::ERANGE)?),
            // SAFETY: CLONE_PIDFD put a new descriptor there, which is ours.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

/// Enters a time namespace.
pub fn enter_time(namespace: BorrowedFd<'_>) -> Result<()> {
    let kind = crate::spec::CLONE_NEWTIME;
    // SAFETY: touches no memory of ours.
    Errno::result(unsafe { libc::syscall(libc::SYS_setns, namespace.as_raw_fd(), kind) }).map(drop)
}

/// Makes a time namespace for children.
pub fn unshare_time() -> Result<()> {
    // SAFETY: touches no memory of ours. The flag is too small for what the C library takes for a namespace's.
    Errno::result(unsafe { libc::syscall(libc::SYS_unshare, crate::spec::CLONE_NEWTIME) }).map(drop)
}

/// `fork(2)` of a child that is not this process's but its parent's (`CLONE_PARENT`), into new namespaces
/// (`CLONE_NEW*`), and into the pid namespace that was joined for children. The pid is one of this process's pid
/// namespace.
///
/// # Safety
/// As with [`fork_into`].
pub unsafe fn fork_sibling(namespaces: u64) -> Result<Fork> {
    // SAFETY: the caller's promise is this function's too.
    unsafe {
        fork_with(CloneArgs {
            flags: namespaces | libc::CLONE_PARENT as u64,
            ..Default::default()
        })
    }
}

/// Joins namespaces (`CLONE_NEW*`) of the process behind a pidfd; `setns(2)`. Its pid namespace becomes that of
/// children only. The user namespace comes last: in it this process has no rights in those that others own.
pub fn join_namespaces(pidfd: BorrowedFd<'_>, namespaces: u64) -> Result<()> {
    let user = libc::CLONE_NEWUSER as u64;
    for flags in [namespaces & !user, namespaces & user] {
        let flags = libc::c_int::try_from(flags).map_err(|_| Errno::EINVAL)?;
        if flags != 0 {
            // SAFETY: touches no memory.
            Errno::result(unsafe { libc::setns(pidfd.as_raw_fd(), flags) })?;
        }
    }
    Ok(())
}

/// Whether the working directory is below the root directory of this process; `getcwd(2)` itself, which says so by
/// the first byte, where the C library goes on to search.
pub fn cwd_is_in_root() -> Result<bool> {
    let mut path = [0u8; libc::PATH_MAX as usize];
    // SAFETY: the kernel writes at most the length given to the buffer, which lives across the call.
    match Errno::result(unsafe { libc::syscall(libc::SYS_getcwd, path.as_mut_ptr(), path.len()) }) {
        Ok(_) => Ok(path.first() == Some(&b'/')),
        // It is not anywhere any more.
        Err(Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Whether a child has been reaped: nobody can hear of its end any more.
pub fn is_reaped(pidfd: BorrowedFd<'_>) -> bool {
    use nix::sys::wait::{Id, WaitPidFlag, waitid};
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    waitid(Id::PIDFd(pidfd), flags) == Err(Errno::ECHILD)
}

/// Whether the process behind a pidfd has ended, reaped or not.
pub fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// A descriptor of a process: for certain only of a child that has not been waited for.
pub fn open_process(pid: u32) -> Result<OwnedFd> {
    // SAFETY: touches no memory of ours.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Sends a signal to the process behind a pidfd.
pub fn signal_process(pidfd: BorrowedFd<'_>, signal: i32) -> Result<()> {
    // SAFETY: touches no memory of ours; a null siginfo is allowed.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(drop)
}

/// Reaps one child that has ended, if there is one: its pid, and its status as shells count it: 0 to 255, or 128 + N
/// when it was ended by signal N. (`nix` fails on the status of a real-time signal, after it has reaped the child.)
pub fn reap_one() -> Result<Option<(Pid, u32)>> {
    let mut status = 0;
    // SAFETY: `status` lives across the call.
    match Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) })? {
        0 => Ok(None),
        pid => {
            let code = if libc::WIFSIGNALED(status) {
                128 + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            };
            Ok(Some((Pid::from_raw(pid), code.unsigned_abs())))
        }
    }
}

/// Registers a descriptor's owner with the runtime.
pub fn watch_fd<T: OwnsFd>(owner: T, interest: Interest) -> std::io::Result<AsyncFd<T>> {
    // SAFETY: the types below own one descriptor, which neither changes nor is closed while they live, and AsyncFd
    // hands out no mutable reference that the modules of this crate would replace it through.
    unsafe { AsyncFd::register_with_interest(owner, interest) }.map_err(Into::into)
}

/// Types that own exactly one descriptor for as long as they live.
pub trait OwnsFd: AsRawFd {}

impl OwnsFd for OwnedFd {}
impl OwnsFd for std::fs::File {}
impl OwnsFd for SignalFd {}

/// Closes every descriptor from `first` up, but for those of `keep`, which it sorts: a child of a process with several threads may not
/// allocate.
///
/// # Safety
/// No owner of a closed descriptor may use or drop it afterwards.
pub unsafe fn close_from(first: RawFd, keep: &mut [RawFd]) -> Result<()> {
    keep.sort_unstable();
    let mut first = first;
    for &mut kept in keep {
        if kept > first {
            // SAFETY: touches no memory; who owned the descriptors is the caller's concern.
            Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, kept - 1, 0) })?;
        }
        first = first.max(kept + 1);
    }
    // SAFETY: as above.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) })
        .map(drop)
}

/// Sets a resource limit of another process; `prlimit(2)`.
pub fn set_limit_of(
    pid: Pid,
    resource: nix::sys::resource::Resource,
    soft: u64,
    hard: u64,
) -> Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: the kernel reads `limit`, which lives across the call; null says that the old one is not wanted.
    Errno::result(unsafe {
        libc::prlimit64(
            pid.as_raw(),
            resource as libc::__rlimit_resource_t,
            &raw const limit,
            std::ptr::null_mut(),
        )
    })
    .map(drop)
}

/// Joins the session keyring of this name, or a new one if this process can find none; its serial number.
pub fn join_session_keyring(name: &str) -> Result<i32> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    let name = c_string(name.as_bytes())?;
    // SAFETY: the name lives across the call.
    let serial = Errno::result(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr())
    })?;
    i32::try_from(serial).map_err(|_| Errno::EOVERFLOW)
}

/// Lets the user that a session keyring belongs to find it by its name.
pub fn let_owner_find_keyring(serial: i32) -> Result<()> {
    const KEYCTL_SETPERM: libc::c_int = 5;
    // KEY_POS_ALL, KEY_USR_VIEW, KEY_USR_READ and KEY_USR_LINK, which it is born with, and KEY_USR_SEARCH (linux/key.h).
    const PERMISSIONS: libc::c_ulong = 0x3f1b_0000;
    // SAFETY: touches no memory.
    Errno::result(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, serial, PERMISSIONS) })
        .map(drop)
}

/// Sets the I/O priority of this process; `ioprio_set(2)`.
pub fn set_io_priority(class: u16, level: u16) -> Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    let value = libc::c_int::from(class) << 13 | libc::c_int::from(level);
    // SAFETY: touches no memory.
    Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) })
        .map(drop)
}

/// `struct sched_attr` of `sched_setattr(2)`, version 0.
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Sets the scheduling of a process.
pub fn set_scheduler(pid: Pid, scheduler: &crate::spec::Scheduler) -> Result<()> {
    let attributes = SchedAttr {
        // 48 bytes.
        size: size_of::<SchedAttr>() as u32,
        policy: scheduler.policy,
        flags: scheduler.flags,
        nice: scheduler.nice,
        priority: scheduler.priority,
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
    };
    // SAFETY: the kernel reads `attributes`, which lives across the call and says its size.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_sched_setattr,
            pid.as_raw(),
            &raw const attributes,
            0,
        )
    })
    .map(drop)
}

/// The slave of a pseudo-terminal's master, opened without a path.
pub fn open_pty_peer(master: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes its flags by value.
    owned(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())
}

/// How many bytes a pipe, socket or terminal has to read.
pub fn readable_bytes(file: BorrowedFd<'_>) -> Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes an int, which lives across the call.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::FIONREAD, &raw mut count) })?;
    usize::try_from(count).map_err(|_| Errno::EOVERFLOW)
}

/// Makes a terminal the controlling one of this session.
pub fn set_controlling_terminal(terminal: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: TIOCSCTTY takes its argument by value.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// Unlocks the slave of a pseudo-terminal's master.
pub fn unlock_pty(master: BorrowedFd<'_>) -> Result<()> {
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int, which lives across the call.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) })
        .map(drop)
}

/// Sets the size of a terminal.
pub fn set_terminal_size(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads a winsize, which lives across the call.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
        .map(drop)
}

/// Brings the loopback interface of this network namespace up.
pub fn loopback_up() -> Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which lives across the call.
    Errno::result(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)
    })
    .map(drop)
}
