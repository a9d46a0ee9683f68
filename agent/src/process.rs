//! Becoming the container's process: user, capabilities, limits, working directory, program.
//!
//! The texts of the errors are runc's (libcontainer's `finalizeNamespace`): clients match on them. So is the order, but for a seccomp
//! filter without `no_new_privs`, which comes as late as it can.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{
    AccessFlags, Gid, Uid, chdir, execve, faccessat, fchown, setgroups, setresgid, setresuid,
};

use crate::error::{Context, Error, Kind, Result, errno_of, errno_text};
use crate::seccomp::Filter;
use crate::spec::{Capabilities, Process};

/// Soft limit of open files where the spec sets none.
const DEFAULT_FILES: u64 = 1024;

/// A program found and ready to be executed.
#[derive(Debug)]
pub struct Program {
    path: CString,
    env: Vec<CString>,
}

/// Does everything to this process that the spec's `process` says, except the exec. The root is the container's, and the
/// first `streams` descriptors are its streams.
pub fn become_process(
    process: &Process,
    streams: usize,
    seccomp: Option<&Filter>,
) -> Result<Program> {
    set_limits(process)?;
    if let Some((class, level)) = process.io_priority {
        crate::sys::set_io_priority(class, level).what(|| "process.ioPriority")?;
    }
    let home = process
        .env
        .iter()
        .any(|(name, value)| name == "HOME" && !value.is_empty());
    let home = if home {
        None
    } else {
        Some(home_of(process.uid))
    };

    if process.no_new_privileges {
        nix::sys::prctl::set_no_new_privs().what(|| "process.noNewPrivileges")?;
    }
    umask(Mode::from_bits_truncate(process.umask));
    // Once as root, which may reach what the user may not, and once more as the user, who may own what root may not
    // enter (a volume over NFS, say).
    let entered = match chdir(&process.cwd) {
        Ok(()) => true,
        Err(Errno::EACCES | Errno::EPERM) => false,
        Err(errno) => return Err(cwd_error(&process.cwd, errno)),
    };
    drop_bounding(&process.capabilities.bounding)?;
    nix::sys::prctl::set_keepcaps(true).what(|| "cannot keep capabilities")?;
    own_streams(process.uid, streams);
    let groups: Vec<Gid> = process.groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups).what(|| "process.user.additionalGids")?;
    let (uid, gid) = (Uid::from_raw(process.uid), Gid::from_raw(process.gid));
    setresgid(gid, gid, gid).what(|| "process.user.gid")?;
    setresuid(uid, uid, uid).what(|| "process.user.uid")?;
    if !entered {
        chdir(&process.cwd).map_err(|errno| cwd_error(&process.cwd, errno))?;
    }
    // Through the links of a procfs a path can lead anywhere (CVE-2024-21626).
    if !crate::sys::cwd_is_in_root().what(|| "cannot verify the working directory")? {
        return Err(Error::setup(
            Kind::InvalidArgument,
            "current working directory is outside of container mount namespace root -- possible container breakout \
             detected",
        ));
    }
    nix::sys::prctl::set_keepcaps(false).what(|| "cannot drop capabilities")?;

    // With no_new_privs a filter takes no capability, and waits for the exec. Without, it takes one that is gone in a moment, and all
    // that can be done before is: a profile needs to allow as little as possible.
    let filter = seccomp.filter(|_| !process.no_new_privileges);
    let mut effective = process.capabilities.effective.clone();
    effective.extend(filter.map(|_| Capability::CAP_SYS_ADMIN));
    set_capabilities("effective", CapSet::Effective, &effective)?;
    let program = Program {
        path: find(process)?,
        env: environment(process, home),
    };
    if let Some(filter) = filter {
        filter.load()?;
    }
    apply_capabilities(&process.capabilities)?;
    Ok(program)
}

/// Sets the limits of this process.
pub fn set_limits(process: &Process) -> Result<()> {
    for (resource, soft, hard) in limits(process)? {
        // It may have been set outside of a user namespace, where raising one takes no capability of that.
        if getrlimit(resource) != Ok((soft, hard)) {
            setrlimit(resource, soft, hard).what(|| format!("process.rlimits ({resource:?})"))?;
        }
    }
    Ok(())
}

/// The limits that a process is to have: the spec's, and one of open files.
pub fn limits(process: &Process) -> Result<Vec<(Resource, u64, u64)>> {
    let mut limits = process.rlimits.clone();
    if !limits
        .iter()
        .any(|(resource, ..)| *resource == Resource::RLIMIT_NOFILE)
    {
        // The agent's own is too high for programs that close, or select on, every descriptor there may be.
        let (_, hard) =
            getrlimit(Resource::RLIMIT_NOFILE).what(|| "cannot read a resource limit")?;
        limits.push((Resource::RLIMIT_NOFILE, hard.min(DEFAULT_FILES), hard));
    }
    Ok(limits)
}

fn cwd_error(cwd: &Path, errno: Errno) -> Error {
    Error::setup(
        Kind::of(errno),
        format!(
            "chdir to cwd ({cwd:?}) set in config.json failed: {}",
            errno_text(errno)
        ),
    )
}

/// Puts this process under the filter that [`become_process`] was given, if it left that for the last moment.
pub fn go_under_filter(process: &Process, seccomp: Option<&Filter>) -> Result<()> {
    match seccomp {
        Some(filter) if process.no_new_privileges => filter.load(),
        _ => Ok(()),
    }
}

/// Replaces this process; returns only the error. `seccomp` is what [`become_process`] was given.
pub fn execute(process: &Process, program: &Program, seccomp: Option<&Filter>) -> Error {
    match go_under_filter(process, seccomp) {
        Ok(()) => replace(process, program),
        Err(error) => error,
    }
}

/// Replaces this process, which is under its filter; returns only the error.
pub fn replace(process: &Process, program: &Program) -> Error {
    let Err(errno) = execve(&program.path, &process.args, &program.env);
    Error::setup(
        Kind::of(errno),
        format!(
            "exec {}: {}",
            program.path.to_string_lossy(),
            errno_text(errno)
        ),
    )
}

impl Program {
    /// The environment, as pairs.
    pub fn variables(&self) -> impl Iterator<Item = (&OsStr, &OsStr)> {
        self.env.iter().filter_map(|pair| {
            let pair = pair.to_bytes();
            let end = pair.iter().position(|&byte| byte == b'=')?;
            let (name, value) = pair.split_at_checked(end)?;
            Some((OsStr::from_bytes(name), OsStr::from_bytes(value.get(1..)?)))
        })
    }
}

fn environment(process: &Process, home: Option<Vec<u8>>) -> Vec<CString> {
    let pairs = process
        .env
        .iter()
        .filter(|(name, _)| home.is_none() || name != "HOME")
        .map(|(name, value)| format!("{name}={value}").into_bytes());
    let home = home.as_ref().map(|home| [b"HOME=", &**home].concat());
    // Null bytes were refused with the spec; a home directory can't hold one that came through.
    pairs
        .chain(home)
        .filter_map(|pair| CString::new(pair).ok())
        .collect()
}

fn path_variable(process: &Process) -> &str {
    process
        .env
        .iter()
        .find(|(name, _)| name == "PATH")
        .map_or("", |(_, value)| value)
}

/// Lets the user open /dev/stdout, /dev/fd/3 and their like, which opens the pipe or terminal anew. Where it is not allowed
/// (/dev/null on a read-only mount), it is not needed.
fn own_streams(uid: u32, count: usize) {
    for (number, _) in (0..).zip(0..count) {
        // SAFETY: the process's streams are open until it ends.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let Ok(stat) = nix::sys::stat::fstat(fd) else {
            continue;
        };
        let null = stat.st_mode & libc::S_IFMT == libc::S_IFCHR
            && stat.st_rdev == nix::sys::stat::makedev(1, 3);
        if stat.st_uid != uid && !null {
            let _ = fchown(fd, Some(Uid::from_raw(uid)), None);
        }
    }
}

fn drop_bounding(keep: &CapsHashSet) -> Result<()> {
    for capability in caps::all() {
        if keep.contains(&capability) {
            continue;
        }
        match caps::drop(None, CapSet::Bounding, capability) {
            Ok(()) => {}
            // The kernel has no capability of this number: nothing to drop.
            Err(_) if caps::has_cap(None, CapSet::Bounding, capability).is_err() => {}
            Err(error) => {
                return Err(Error::setup(
                    Kind::Internal,
                    format!("process.capabilities.bounding: cannot drop {capability}: {error}"),
                ));
            }
        }
    }
    Ok(())
}

fn apply_capabilities(sets: &Capabilities) -> Result<()> {
    // The inheritable set grows only while the permitted one is whole; the ambient one must be within both.
    for (name, kind, set) in [
        ("inheritable", CapSet::Inheritable, &sets.inheritable),
        ("effective", CapSet::Effective, &sets.effective),
        ("permitted", CapSet::Permitted, &sets.permitted),
        ("ambient", CapSet::Ambient, &sets.ambient),
    ] {
        set_capabilities(name, kind, set)?;
    }
    Ok(())
}

fn set_capabilities(name: &str, kind: CapSet, set: &CapsHashSet) -> Result<()> {
    caps::set(None, kind, set).map_err(|error| {
        Error::setup(
            Kind::InvalidArgument,
            format!("process.capabilities.{name}: cannot be set: {error}"),
        )
    })
}

/// The home directory of a user in the container's /etc/passwd, or `/`. The file is the image's: only a regular
/// file of a sane size is read, and names may be in any encoding.
fn home_of(uid: u32) -> Vec<u8> {
    const MAX_PASSWD: u64 = 1 << 20;
    let root = || b"/".to_vec();
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open("/etc/passwd");
    let Ok(file) = opened else {
        return root();
    };
    if !file
        .metadata()
        .is_ok_and(|metadata| metadata.mode() & libc::S_IFMT == libc::S_IFREG)
    {
        return root();
    }
    let mut passwd = Vec::new();
    if file.take(MAX_PASSWD).read_to_end(&mut passwd).is_err() {
        return root();
    }
    home_in(&passwd, uid).unwrap_or_else(root)
}

fn home_in(passwd: &[u8], uid: u32) -> Option<Vec<u8>> {
    passwd.split(|&byte| byte == b'\n').find_map(|line| {
        let mut fields = line.split(|&byte| byte == b':');
        let line_uid = std::str::from_utf8(fields.nth(2)?).ok()?.parse::<u32>();
        let home = fields.nth(2)?;
        (line_uid == Ok(uid) && !home.is_empty()).then(|| home.to_vec())
    })
}

/// Finds the program of a process.
pub fn find(process: &Process) -> Result<CString> {
    let name = process.args.first().map(CString::as_c_str);
    look_up(name.unwrap_or_default(), path_variable(process))
}

/// Finds the program as Go's `exec.LookPath` does for runc, with its errors.
fn look_up(name: &CStr, path: &str) -> Result<CString> {
    let shown = name.to_string_lossy();
    let failed = |kind: Kind, why: &str| Error::setup(kind, format!("exec: {shown:?}: {why}"));
    let bytes = name.to_bytes();
    if bytes.contains(&b'/') {
        return match executable(name) {
            Ok(()) => Ok(name.to_owned()),
            Err(Lookup::Stat(errno)) => Err(failed(
                Kind::of(errno),
                &format!("stat {shown}: {}", errno_text(errno)),
            )),
            Err(Lookup::Denied) => Err(failed(Kind::PermissionDenied, "permission denied")),
        };
    }
    for dir in path.split(':') {
        // An empty element is the working directory.
        let dir = if dir.is_empty() { "." } else { dir };
        let candidate = PathBuf::from(dir).join(&*shown);
        let Ok(candidate) = CString::new(candidate.into_os_string().into_encoded_bytes()) else {
            continue;
        };
        if executable(&candidate).is_ok() {
            if !dir.starts_with('/') {
                return Err(failed(
                    Kind::InvalidArgument,
                    "cannot run executable found relative to current directory",
                ));
            }
            return Ok(candidate);
        }
    }
    Err(failed(Kind::NotFound, "executable file not found in $PATH"))
}

enum Lookup {
    Stat(Errno),
    Denied,
}

fn executable(path: &CStr) -> Result<(), Lookup> {
    let stat = nix::sys::stat::stat(path).map_err(Lookup::Stat)?;
    if stat.st_mode & libc::S_IFMT == libc::S_IFDIR || stat.st_mode & 0o111 == 0 {
        return Err(Lookup::Denied);
    }
    faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS).map_err(|_| Lookup::Denied)
}

/// Opens the container's own null device for the streams that nobody asked for, so that what /proc/self/fd shows
/// exists in the container. The agent's stays where the container has none, or something else by that name.
pub fn container_null() -> Option<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_NOFOLLOW)
        .open("/dev/null")
        .ok()?;
    let metadata = file.metadata().ok()?;
    let null = metadata.mode() & libc::S_IFMT == libc::S_IFCHR
        && metadata.rdev() == nix::sys::stat::makedev(1, 3);
    null.then_some(file)
}

/// Writes a file of procfs.
pub fn write_proc(path: &str, value: &str) -> nix::Result<()> {
    use std::io::Write;
    File::options()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|error| errno_of(&error))
}

/// `dup2` to one of the standard descriptors.
pub fn replace_stdio(from: BorrowedFd<'_>, number: usize) -> nix::Result<()> {
    match number {
        0 => nix::unistd::dup2_stdin(from),
        1 => nix::unistd::dup2_stdout(from),
        _ => nix::unistd::dup2_stderr(from),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn find(name: &str, path: &str) -> Result<String, String> {
        look_up(&CString::new(name).unwrap(), path)
            .map(|found| found.into_string().unwrap())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn programs_are_found_and_missed_in_runcs_words() {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir_all(bin.join("folder")).unwrap();
        fs::write(bin.join("tool"), "").unwrap();
        fs::set_permissions(bin.join("tool"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(bin.join("plain"), "").unwrap();
        let path = format!("/nonexistent:{}", bin.display());
        let full = |name: &str| bin.join(name).display().to_string();

        assert_eq!(find("tool", &path).unwrap(), full("tool"));
        assert_eq!(find(&full("tool"), "").unwrap(), full("tool"));
        assert_eq!(
            find("foo", &path).unwrap_err(),
            "exec: \"foo\": executable file not found in $PATH"
        );
        assert_eq!(
            find("tool", "").unwrap_err(),
            "exec: \"tool\": executable file not found in $PATH"
        );
        assert_eq!(
            find("/no/foo", &path).unwrap_err(),
            "exec: \"/no/foo\": stat /no/foo: no such file or directory"
        );
        assert_eq!(
            find("plain", &path).unwrap_err(),
            "exec: \"plain\": executable file not found in $PATH"
        );
        assert_eq!(
            find(&full("plain"), "").unwrap_err(),
            format!("exec: {:?}: permission denied", full("plain"))
        );
        assert_eq!(
            find(&full("folder"), "").unwrap_err(),
            format!("exec: {:?}: permission denied", full("folder"))
        );
        assert_eq!(
            find("", &path).unwrap_err(),
            "exec: \"\": executable file not found in $PATH"
        );
    }

    #[test]
    fn the_home_directory_is_that_of_the_uid() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nbroken\nme:x:1000:1000::/home/me:/bin/sh\nno:x:7:7:::\n";
        assert_eq!(home_in(passwd, 1000).as_deref(), Some(&b"/home/me"[..]));
        assert_eq!(home_in(passwd, 0).as_deref(), Some(&b"/root"[..]));
        assert_eq!(home_in(passwd, 7), None);
        assert_eq!(home_in(passwd, 5), None);
    }
}
