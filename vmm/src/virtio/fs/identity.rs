//! Whose rights a system call is made with: what a file-system thread sets up once, and changes for single calls.
//!
//! All of this is per thread. The guest's kernel has checked permissions (the driver mounts with `default_permissions`), so the
//! thread works as the VMM's own user, and takes the caller's identity only where a new file gets its owner from it, and where data takes
//! blocks, of which file systems keep some for root (what is written by a mapping comes without a caller, and counts as root's). To a server of
//! files that trusts no root (NFS with `root_squash`) all other requests are root's.
//!
//! The thread's capabilities stay meanwhile: the guest has let the caller in by a supplementary group perhaps, of which the
//! protocol says nothing. They are those that files of any owner take, and no others: procfs may be among what is shared.

use std::io;
use std::os::fd::BorrowedFd;

use fuse_backend_rs::api::filesystem::Context;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, fchdir, getegid, geteuid, setfsgid, setfsuid};

/// Prepares the calling thread: its own working directory and umask, and the few capabilities of [`KEPT`], which survive a change of
/// identity.
///
/// The working directory becomes `proc_self_fd` (an open `/proc/self/fd`), where extended attributes are reached by
/// descriptor: those system calls take no descriptors without access rights (`O_PATH`).
pub fn prepare_thread(proc_self_fd: BorrowedFd<'_>) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    umask(Mode::empty());
    fchdir(proc_self_fd)?;
    keep_capabilities();
    drop_other_capabilities()
}

fn keep_capabilities() {
    // SAFETY: takes and returns plain numbers.
    let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS) };
    if bits >= 0 && bits & libc::SECBIT_NO_SETUID_FIXUP != 0 {
        return;
    }
    // SAFETY: as above.
    let done = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits | libc::SECBIT_NO_SETUID_FIXUP) };
    if bits < 0 || done < 0 {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            tracing::warn!(
                "without CAP_SETPCAP, users of the guest can't create files in directories that only a supplementary group lets them write"
            );
        });
    }
}

/// What files of any owner take, by the numbers of capabilities(7). Not among them, as containers haven't them either unless they are
/// given: what opens other processes' memory (`CAP_SYS_PTRACE`), what goes beyond quotas and, for anybody but root, into
/// reserved blocks (`CAP_SYS_RESOURCE`), and what an administrator may do (`CAP_SYS_ADMIN`).
const KEPT: u64 = 1 << 0 // CAP_CHOWN
    | 1 << 1 // CAP_DAC_OVERRIDE
    | 1 << 3 // CAP_FOWNER
    | 1 << CAP_FSETID
    | 1 << 6 // CAP_SETGID: whose a new file is
    | 1 << 7 // CAP_SETUID
    | 1 << 27 // CAP_MKNOD
    | 1 << 31; // CAP_SETFCAP

/// Drops all capabilities that a file-system thread has no use for.
fn drop_other_capabilities() -> io::Result<()> {
    let mut data = capget()?;
    for (data, kept) in data.iter_mut().zip([KEPT as u32, (KEPT >> 32) as u32]) {
        data.permitted &= kept;
        data.effective &= kept;
        data.inheritable = 0;
    }
    capset(&data)
}

thread_local! {
    /// Whom a file-system thread works as. Nothing in the VMM changes that.
    static OWN: (Uid, Gid) = (geteuid(), getegid());
}

/// The identity of a request's caller, until dropped.
#[derive(Debug)]
#[must_use]
pub struct AsCaller {
    /// The thread's own, if the caller's is another.
    back: Option<(Uid, Gid)>,
    masked: bool,
}

impl AsCaller {
    /// Takes the caller's user and group for file-system accesses, and its umask.
    pub fn new(context: &Context, mask: u32) -> io::Result<Self> {
        let own = OWN.with(|own| *own);
        let caller = (Uid::from_raw(context.uid), Gid::from_raw(context.gid));
        let guard = Self {
            back: (caller != own).then_some(own),
            masked: mask & 0o777 != 0,
        };
        if guard.masked {
            umask(Mode::from_bits_truncate(mask & 0o777));
        }
        if guard.back.is_some() && !take(caller) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        Ok(guard)
    }
}

impl Drop for AsCaller {
    fn drop(&mut self) {
        if self.masked {
            umask(Mode::empty());
        }
        if let Some(own) = self.back {
            go_back(take(own));
        }
    }
}

/// Takes a user and a group for file-system accesses; returns whether that worked.
fn take((uid, gid): (Uid, Gid)) -> bool {
    setfsgid(gid);
    // These two calls do not say whether they worked. With a value that nobody can have they change nothing and say what is.
    setfsgid(Gid::from_raw(u32::MAX)) == gid && take_user(uid)
}

/// Takes a user for file-system accesses; returns whether that worked.
fn take_user(uid: Uid) -> bool {
    setfsuid(uid);
    setfsuid(Uid::from_raw(u32::MAX)) == uid
}

/// The user that a request takes disk space as, until dropped: file systems keep some for root. Cheaper than [`AsCaller`], as there may be
/// many such requests, and for root's own requests nothing at all.
#[derive(Debug)]
#[must_use]
pub struct AsUser {
    back: Option<Uid>,
}

impl AsUser {
    /// Takes the caller's user for file-system accesses.
    pub fn new(context: &Context) -> io::Result<Self> {
        let own = OWN.with(|own| own.0);
        let caller = Uid::from_raw(context.uid);
        let guard = Self {
            back: (caller != own).then_some(own),
        };
        if guard.back.is_some() && !take_user(caller) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        Ok(guard)
    }
}

impl Drop for AsUser {
    fn drop(&mut self) {
        if let Some(own) = self.back {
            go_back(take_user(own));
        }
    }
}

/// Going back to the thread's own user is always allowed. Going on as another one is not an option.
fn go_back(done: bool) {
    if !done {
        tracing::error!("a file-system thread can't return to its own identity");
        std::process::abort();
    }
}

/// `CAP_FSETID`.
const CAP_FSETID: u32 = 4;
/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `CAP_FSETID` dropped until this is: writes clear set-user-ID and set-group-ID bits, as they do for the guest's users.
#[derive(Debug)]
#[must_use]
pub struct WithoutFsetid {
    before: [CapData; 2],
}

impl WithoutFsetid {
    /// Drops the capability if the guest asks for that.
    pub fn when(wanted: bool) -> io::Result<Option<Self>> {
        if !wanted {
            return Ok(None);
        }
        let before = capget()?;
        let mut after = before;
        after[0].effective &= !(1 << CAP_FSETID);
        capset(&after)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        if let Err(error) = capset(&self.before) {
            // Effective capabilities within the permitted ones can always be set.
            tracing::error!(%error, "a file-system thread can't take CAP_FSETID back");
        }
    }
}

fn capget() -> io::Result<[CapData; 2]> {
    let mut header = CapHeader {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 of the structure has one header and two data elements, which outlive the call.
    let done = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(data)
}

fn capset(data: &[CapData; 2]) -> io::Result<()> {
    let mut header = CapHeader {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    // SAFETY: as in `capget`; the kernel only reads the data.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
