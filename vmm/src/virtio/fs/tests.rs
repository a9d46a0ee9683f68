//! The device against a mock driver that speaks FUSE, with honest and hostile guests.

use std::ffi::{CStr, CString};
use std::fs;
use std::io::Write;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use fuse_backend_rs::abi::fuse_abi::{
    AttrOut, CreateIn, EntryOut, FallocateIn, GetxattrIn, InHeader, InitIn, InitOut, LinkIn,
    MkdirIn, MknodIn, Opcode, OpenIn, OpenOut, OutHeader, ReadIn, ReleaseIn, RenameIn, SetattrIn,
    SetxattrIn, WriteIn, WriteOut,
};
use fuse_backend_rs::api::filesystem::{Context, FileSystem, FsOptions, OpenOptions};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{SigSet, Signal};
use tempfile::TempDir;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestAddressSpace};

use super::tables::Stamp;
use super::*;
use crate::virtio::Memory;
use crate::virtio::mock_driver::{self, Line, Piece, Random, Ring};

const RING: u16 = 256;
const HIGH: u64 = 0;
const REQUESTS: u64 = HIGH + Ring::footprint(RING);
const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x40_0000;
const ROOM: usize = (1 << 20) + 4096;
const MEMORY: usize = 0x80_0000;
const ROOT: u64 = 1;

struct Guest {
    fs: Fs,
    memory: Memory,
    line: Line,
    high: Ring,
    requests: Ring,
    unique: u64,
    uid: u32,
    gid: u32,
    dir: TempDir,
}

type Answer<T> = Result<T, i32>;

fn share(dir: &TempDir) -> ShareConfig {
    ShareConfig {
        tag: "bulkhead".to_owned(),
        directory: dir.path().to_owned(),
        queues: 1,
        files: 1 << 20,
    }
}

impl Guest {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let shared = dir.path().to_owned();
        Self::with(dir, shared)
    }

    /// A guest that shares a directory which it must not change.
    fn sharing(directory: &str) -> Self {
        Self::with(TempDir::new().unwrap(), directory.into())
    }

    fn with(dir: TempDir, directory: PathBuf) -> Self {
        let memory = mock_driver::memory(MEMORY);
        let config = ShareConfig {
            directory,
            ..share(&dir)
        };
        let mut guest = Self {
            fs: Fs::new(&config).unwrap(),
            high: Ring::new(&memory, HIGH, RING),
            requests: Ring::new(&memory, REQUESTS, RING),
            line: Line::new(),
            memory,
            unique: 0,
            uid: 0,
            gid: 0,
            dir,
        };
        guest.activate();
        guest.init();
        guest
    }

    fn activate(&mut self) {
        self.fs
            .activate(Activation {
                memory: self.memory.clone(),
                features: self.fs.features(),
                queues: vec![self.high.active(), self.requests.active()],
                interrupt: self.line.interrupt.clone(),
            })
            .unwrap();
    }

    fn init(&mut self) -> InitOut {
        let init = InitIn {
            major: 7,
            minor: 37,
            max_readahead: 128 * 1024,
            flags: !(FsOptions::INIT_EXT.bits() as u32),
        };
        self.call_for(Opcode::Init, 0, init.as_slice()).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn header(&mut self, opcode: u32, node: u64, len: usize) -> InHeader {
        self.unique += 1;
        InHeader {
            len: (size_of::<InHeader>() + len) as u32,
            opcode,
            unique: self.unique,
            nodeid: node,
            uid: self.uid,
            gid: self.gid,
            pid: 1,
            padding: 0,
        }
    }

    /// Sends raw bytes; returns what was written as a reply.
    fn exchange(&mut self, request: &[u8], room: usize) -> Vec<u8> {
        self.memory
            .memory()
            .write_slice(request, GuestAddress(REQUEST))
            .unwrap();
        let mut pieces = vec![Piece::read(REQUEST, request.len())];
        if room > 0 {
            pieces.push(Piece::write(REPLY, room.min(16)));
        }
        if room > 16 {
            pieces.push(Piece::write(REPLY + 16, room - 16));
        }
        let posted = self.requests.post(&pieces).unwrap();
        self.requests.notify();
        let (head, len) = self.requests.wait(&self.line);
        assert_eq!(head, posted);
        let mut reply = vec![0; len as usize];
        self.memory
            .memory()
            .read_slice(&mut reply, GuestAddress(REPLY))
            .unwrap();
        reply
    }

    /// Makes the `i`th of several requests available, without a notification; returns its head.
    fn put(&mut self, i: u64, opcode: Opcode, node: u64, body: &[u8]) -> u16 {
        let header = self.header(opcode as u32, node, body.len());
        let request = [header.as_slice(), body].concat();
        let at = REQUEST + i * 256;
        self.memory
            .memory()
            .write_slice(&request, GuestAddress(at))
            .unwrap();
        let pieces = [
            Piece::read(at, request.len()),
            Piece::write(REPLY + i * 4096, 4096),
        ];
        self.requests.post(&pieces).unwrap()
    }

    fn call(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> Answer<Vec<u8>> {
        let header = self.header(opcode as u32, node, body.len());
        let reply = self.exchange(&[header.as_slice(), body].concat(), ROOM);
        let (head, body) = reply.split_at(size_of::<OutHeader>());
        let head = *OutHeader::from_slice(head).unwrap();
        assert_eq!(head.unique, self.unique);
        assert_eq!(head.len as usize, reply.len());
        match head.error {
            0 => Ok(body.to_vec()),
            error => Err(-error),
        }
    }

    fn call_for<T: ByteValued>(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> Answer<T> {
        let reply = self.call(opcode, node, body)?;
        Ok(read(&reply))
    }

    /// Looks a name up as Linux does: an entry without an inode says that there is none.
    fn lookup(&mut self, parent: u64, name: &str) -> Answer<EntryOut> {
        let entry: EntryOut = self.call_for(Opcode::Lookup, parent, &c(name))?;
        if entry.nodeid == 0 {
            return Err(libc::ENOENT);
        }
        Ok(entry)
    }

    fn walk(&mut self, path: &str) -> u64 {
        path.split('/')
            .fold(ROOT, |node, name| self.lookup(node, name).unwrap().nodeid)
    }

    fn open(&mut self, node: u64, flags: i32) -> Answer<OpenOut> {
        let open = OpenIn {
            flags: flags as u32,
            fuse_flags: 0,
        };
        self.call_for(Opcode::Open, node, open.as_slice())
    }

    fn opendir(&mut self, node: u64) -> Answer<OpenOut> {
        let open = OpenIn {
            flags: 0,
            fuse_flags: 0,
        };
        self.call_for(Opcode::Opendir, node, open.as_slice())
    }

    fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Answer<(EntryOut, OpenOut)> {
        let create = CreateIn {
            flags: flags as u32,
            mode: mode | libc::S_IFREG,
            umask: 0o022,
            fuse_flags: 0,
        };
        let reply = self.call(
            Opcode::Create,
            parent,
            &[create.as_slice(), &c(name)].concat(),
        )?;
        Ok((read(&reply), read(&reply[size_of::<EntryOut>()..])))
    }

    fn mkdir(&mut self, parent: u64, name: &str) -> Answer<EntryOut> {
        let mkdir = MkdirIn {
            mode: 0o777,
            umask: 0o022,
        };
        self.call_for(
            Opcode::Mkdir,
            parent,
            &[mkdir.as_slice(), &c(name)].concat(),
        )
    }

    fn mknod(&mut self, parent: u64, name: &str, mode: u32, rdev: u32) -> Answer<EntryOut> {
        let mknod = MknodIn {
            mode,
            rdev,
            umask: 0,
            padding: 0,
        };
        self.call_for(
            Opcode::Mknod,
            parent,
            &[mknod.as_slice(), &c(name)].concat(),
        )
    }

    fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Answer<Vec<u8>> {
        let read = ReadIn {
            fh,
            offset,
            size,
            ..ReadIn::default()
        };
        self.call(Opcode::Read, node, read.as_slice())
    }

    fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8], flags: i32) -> Answer<u32> {
        self.write_with(node, fh, offset, data, flags, 0)
    }

    fn write_with(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        flags: i32,
        fuse_flags: u32,
    ) -> Answer<u32> {
        let write = WriteIn {
            fh,
            offset,
            size: data.len() as u32,
            flags: flags as u32,
            fuse_flags,
            ..WriteIn::default()
        };
        let out: WriteOut =
            self.call_for(Opcode::Write, node, &[write.as_slice(), data].concat())?;
        Ok(out.size)
    }

    fn release(&mut self, opcode: Opcode, node: u64, fh: u64) -> Answer<()> {
        let release = ReleaseIn {
            fh,
            ..ReleaseIn::default()
        };
        self.call(opcode, node, release.as_slice()).map(|_| ())
    }

    fn forget(&mut self, node: u64, count: u64) {
        let header = self.header(Opcode::Forget as u32, node, 8);
        let request = [header.as_slice(), &count.to_le_bytes()].concat();
        self.memory
            .memory()
            .write_slice(&request, GuestAddress(REQUEST))
            .unwrap();
        self.high
            .post(&[Piece::read(REQUEST, request.len())])
            .unwrap();
        self.high.notify();
        assert_eq!(self.high.wait(&self.line).1, 0);
    }

    /// All entries of a directory: name, inode number, node (for the plus variant).
    fn list(&mut self, node: u64, plus: bool, size: u32) -> Vec<(String, u64, u64)> {
        let fh = self.opendir(node).unwrap().fh;
        let mut found = Vec::new();
        let mut offset = 0;
        loop {
            let read_in = ReadIn {
                fh,
                offset,
                size,
                ..ReadIn::default()
            };
            let opcode = if plus {
                Opcode::Readdirplus
            } else {
                Opcode::Readdir
            };
            let reply = self.call(opcode, node, read_in.as_slice()).unwrap();
            if reply.is_empty() {
                break;
            }
            let mut rest = reply.as_slice();
            while !rest.is_empty() {
                let mut inode = 0;
                if plus {
                    inode = read::<EntryOut>(rest).nodeid;
                    rest = &rest[size_of::<EntryOut>()..];
                }
                let ino = u64::from_le_bytes(rest[0..8].try_into().unwrap());
                offset = u64::from_le_bytes(rest[8..16].try_into().unwrap());
                let len = u32::from_le_bytes(rest[16..20].try_into().unwrap()) as usize;
                let name = String::from_utf8(rest[24..24 + len].to_vec()).unwrap();
                found.push((name, ino, inode));
                rest = &rest[(24 + len).next_multiple_of(8)..];
            }
        }
        self.release(Opcode::Releasedir, node, fh).unwrap();
        found.sort();
        found
    }

    fn known(&self) -> usize {
        self.fs.share.inode_count()
    }
}

fn c(name: &str) -> Vec<u8> {
    CString::new(name).unwrap().into_bytes_with_nul()
}

fn read<T: ByteValued>(bytes: &[u8]) -> T {
    let mut value = T::zeroed();
    value
        .as_mut_slice()
        .copy_from_slice(&bytes[..size_of::<T>()]);
    value
}

fn need_root() {
    assert!(nix::unistd::geteuid().is_root(), "the test needs root");
}

#[test]
fn the_configuration_space_holds_tag_and_queues() {
    let dir = TempDir::new().unwrap();
    let fs = Fs::new(&ShareConfig {
        queues: 3,
        ..share(&dir)
    })
    .unwrap();
    assert_eq!(&fs.config()[..9], b"bulkhead\0");
    assert_eq!(fs.config()[36..], [3, 0, 0, 0]);
    assert_eq!(fs.queue_sizes().len(), 4);
}

#[test]
fn bad_shares_are_refused_with_the_reason() {
    let dir = TempDir::new().unwrap();
    let bad = |change: fn(&mut ShareConfig)| {
        let mut config = share(&dir);
        change(&mut config);
        Fs::new(&config).err().unwrap()
    };
    assert!(matches!(bad(|c| c.tag.clear()), FsError::Tag(_)));
    assert!(matches!(bad(|c| c.tag = "x".repeat(37)), FsError::Tag(_)));
    assert!(matches!(bad(|c| c.queues = 0), FsError::Queues(0)));
    assert!(matches!(bad(|c| c.queues = 9), FsError::Queues(9)));
    let error = bad(|c| c.directory.push("missing"));
    assert!(error.to_string().contains("missing"), "{error}");
}

#[test]
fn the_protocol_is_negotiated() {
    let mut guest = Guest::new();
    let out = guest.init();
    assert_eq!((out.major, out.max_write, out.max_pages), (7, 1 << 20, 256));
    let flags = FsOptions::from_bits_truncate(out.flags.into());
    assert!(flags.contains(
        FsOptions::PARALLEL_DIROPS | FsOptions::HANDLE_KILLPRIV_V2 | FsOptions::POSIX_ACL
    ));
    assert_ne!(out.flags & 1 << 29, 0, "FUSE_SETXATTR_EXT");
    assert!(!flags.intersects(
        FsOptions::WRITEBACK_CACHE
            | FsOptions::POSIX_LOCKS
            | FsOptions::FLOCK_LOCKS
            | FsOptions::EXPORT_SUPPORT
            | FsOptions::ZERO_MESSAGE_OPEN
    ));
}

#[test]
fn files_are_looked_up_and_read() {
    let mut guest = Guest::new();
    fs::create_dir(guest.path("dir")).unwrap();
    fs::write(guest.path("dir/file"), "content").unwrap();
    let node = guest.walk("dir/file");
    let open = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, open.fh, 0, 100).unwrap(), b"content");
    assert_eq!(guest.read(node, open.fh, 3, 2).unwrap(), b"te");
    assert_eq!(guest.read(node, open.fh, 7, 100).unwrap(), b"");
    guest.release(Opcode::Release, node, open.fh).unwrap();
    assert_eq!(guest.read(node, open.fh, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.lookup(ROOT, "missing").err(), Some(libc::ENOENT));
    let attr: AttrOut = guest.call_for(Opcode::Getattr, node, &[0; 16]).unwrap();
    assert_eq!(attr.attr.size, 7);
    assert_eq!(attr.attr_valid, 1);
}

#[test]
fn the_guest_may_believe_for_a_second_that_a_name_is_not_there() {
    let mut guest = Guest::new();
    let missing: EntryOut = guest.call_for(Opcode::Lookup, ROOT, &c("missing")).unwrap();
    assert_eq!((missing.nodeid, missing.entry_valid), (0, 1));
    fs::write(guest.path("missing"), "").unwrap();
    guest.lookup(ROOT, "missing").unwrap();
}

#[test]
fn files_are_created_written_and_removed() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, "new", libc::O_RDWR, 0o666).unwrap();
    let big: Vec<u8> = (0..1 << 20).map(|i| (i % 253) as u8).collect();
    assert_eq!(
        guest.write(entry.nodeid, open.fh, 10, &big, 0).unwrap(),
        1 << 20
    );
    assert_eq!(fs::read(guest.path("new")).unwrap()[10..], big);
    assert_eq!(guest.read(entry.nodeid, open.fh, 10, 1 << 20).unwrap(), big);
    assert_eq!(
        fs::metadata(guest.path("new")).unwrap().mode() & 0o7777,
        0o644
    );
    assert_eq!(
        guest.create(ROOT, "new", libc::O_EXCL, 0o666).err(),
        Some(libc::EEXIST)
    );
    guest.call(Opcode::Unlink, ROOT, &c("new")).unwrap();
    assert!(!guest.path("new").exists());
    // It is still open.
    assert_eq!(guest.read(entry.nodeid, open.fh, 10, 4).unwrap(), big[..4]);
    let attr: AttrOut = guest
        .call_for(Opcode::Getattr, entry.nodeid, &[0; 16])
        .unwrap();
    assert_eq!(attr.attr.nlink, 0);
}

#[test]
fn a_file_that_has_come_meanwhile_is_left_to_the_guest_to_look_up_and_judge() {
    let mut guest = Guest::new();
    fs::write(guest.path("secret"), "").unwrap();
    (guest.uid, guest.gid) = (1234, 2345);
    // Linux looks up again at this answer. What a creation opens it takes for new, and asks for no permissions.
    assert_eq!(
        guest.create(ROOT, "secret", libc::O_RDWR, 0o666).err(),
        Some(libc::ESTALE)
    );
    assert_eq!(guest.known(), 1);
}

#[test]
fn appends_go_to_the_files_end() {
    let mut guest = Guest::new();
    let (entry, open) = guest
        .create(ROOT, "log", libc::O_WRONLY | libc::O_APPEND, 0o644)
        .unwrap();
    guest
        .write(entry.nodeid, open.fh, 0, b"guest ", libc::O_APPEND)
        .unwrap();
    fs::write(guest.path("log"), "guest host ").unwrap();
    // The guest does not know of the host's part yet.
    guest
        .write(entry.nodeid, open.fh, 6, b"guest", libc::O_APPEND)
        .unwrap();
    assert_eq!(fs::read(guest.path("log")).unwrap(), b"guest host guest");
}

#[test]
fn directories_are_made_listed_and_removed() {
    let mut guest = Guest::new();
    for i in 0..300 {
        fs::write(guest.path(&format!("file-{i:03}")), "").unwrap();
    }
    guest.mkdir(ROOT, "sub").unwrap();
    for plus in [false, true] {
        let all = guest.list(ROOT, plus, 4096);
        assert_eq!(all.len(), 303, "plus: {plus}");
        assert_eq!(all[0].0, ".");
        assert_eq!(all[1].0, "..");
        let (name, ino, node) = &all[2];
        assert_eq!(name, "file-000");
        assert_eq!(
            *ino as u32,
            fs::metadata(guest.path(name)).unwrap().ino() as u32
        );
        assert_eq!(*node != 0, plus);
        assert_eq!(all[0].2, 0, "no node for dots");
    }
    // The plus variant told of 301 files; the lookups of the mkdir were one.
    assert_eq!(guest.known(), 302);
    assert_eq!(
        guest.call(Opcode::Rmdir, ROOT, &c("file-000")).err(),
        Some(libc::ENOTDIR)
    );
    guest.call(Opcode::Rmdir, ROOT, &c("sub")).unwrap();
    assert!(!guest.path("sub").exists());
}

#[test]
fn a_directory_that_is_emptied_while_it_is_read_shows_every_entry() {
    // tmpfs before Linux 6.6 counts entries: an offset is of no use after a removal. `rm -r` failed there.
    own_mounts();
    let none: Option<&str> = None;
    let mut guest = Guest::new();
    fs::create_dir(guest.path("tmp")).unwrap();
    mount(
        Some("tmpfs"),
        &guest.path("tmp"),
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )
    .unwrap();
    for i in 0..400 {
        fs::write(guest.path(&format!("tmp/{i}")), "").unwrap();
    }
    let dir = guest.walk("tmp");
    let fh = guest.opendir(dir).unwrap().fh;
    let mut offset = 0;
    loop {
        let list = ReadIn {
            fh,
            offset,
            size: 1000,
            ..ReadIn::default()
        };
        let reply = guest.call(Opcode::Readdir, dir, list.as_slice()).unwrap();
        let mut rest = reply.as_slice();
        if rest.is_empty() {
            break;
        }
        while !rest.is_empty() {
            offset = u64::from_le_bytes(rest[8..16].try_into().unwrap());
            let len = u32::from_le_bytes(rest[16..20].try_into().unwrap()) as usize;
            let name = std::str::from_utf8(&rest[24..24 + len]).unwrap();
            if !name.starts_with('.') {
                guest.call(Opcode::Unlink, dir, &c(name)).unwrap();
            }
            rest = &rest[(24 + len).next_multiple_of(8)..];
        }
    }
    assert_eq!(fs::read_dir(guest.path("tmp")).unwrap().count(), 0);
    nix::mount::umount2(&guest.path("tmp"), nix::mount::MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn links_and_renames_work() {
    let mut guest = Guest::new();
    fs::write(guest.path("a"), "a").unwrap();
    let node = guest.lookup(ROOT, "a").unwrap().nodeid;
    let link = LinkIn { oldnodeid: node };
    let linked: EntryOut = guest
        .call_for(Opcode::Link, ROOT, &[link.as_slice(), &c("b")].concat())
        .unwrap();
    assert_eq!((linked.nodeid, linked.attr.nlink), (node, 2));

    let entry: EntryOut = guest
        .call_for(
            Opcode::Symlink,
            ROOT,
            &[c("link"), c("some/target")].concat(),
        )
        .unwrap();
    assert_eq!(
        guest.call(Opcode::Readlink, entry.nodeid, &[]).unwrap(),
        b"some/target"
    );
    // A hard link to the symbolic link, not to its target.
    let link = LinkIn {
        oldnodeid: entry.nodeid,
    };
    let linked: EntryOut = guest
        .call_for(Opcode::Link, ROOT, &[link.as_slice(), &c("link2")].concat())
        .unwrap();
    assert_eq!(linked.nodeid, entry.nodeid);

    let sub = guest.mkdir(ROOT, "sub").unwrap().nodeid;
    let rename = RenameIn { newdir: sub };
    guest
        .call(
            Opcode::Rename,
            ROOT,
            &[rename.as_slice(), &c("a"), &c("c")].concat(),
        )
        .unwrap();
    assert_eq!(fs::read(guest.path("sub/c")).unwrap(), b"a");
    assert_eq!(
        guest.lookup(sub, "c").unwrap().nodeid,
        node,
        "still the same file"
    );
}

#[test]
fn attributes_are_set() {
    let mut guest = Guest::new();
    fs::write(guest.path("f"), "0123456789").unwrap();
    let node = guest.lookup(ROOT, "f").unwrap().nodeid;
    // FATTR_MODE, FATTR_SIZE, FATTR_MTIME.
    let set = SetattrIn {
        valid: 1 | 8 | 32,
        mode: 0o100_640,
        size: 4,
        mtime: 1_000_000,
        mtimensec: 5,
        ..SetattrIn::default()
    };
    let out: AttrOut = guest
        .call_for(Opcode::Setattr, node, set.as_slice())
        .unwrap();
    assert_eq!((out.attr.mode, out.attr.size), (0o100_640, 4));
    let metadata = fs::metadata(guest.path("f")).unwrap();
    assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (1_000_000, 5));
    assert_eq!(fs::read(guest.path("f")).unwrap(), b"0123");

    // Times of a symbolic link are its own.
    symlink("f", guest.path("l")).unwrap();
    let link = guest.lookup(ROOT, "l").unwrap().nodeid;
    let set = SetattrIn {
        valid: 32,
        mtime: 7,
        ..SetattrIn::default()
    };
    guest.call(Opcode::Setattr, link, set.as_slice()).unwrap();
    assert_eq!(fs::symlink_metadata(guest.path("l")).unwrap().mtime(), 7);
    assert_eq!(fs::metadata(guest.path("f")).unwrap().mtime(), 1_000_000);
    // And it has no size to set.
    let set = SetattrIn {
        valid: 8,
        ..SetattrIn::default()
    };
    assert_eq!(
        guest.call(Opcode::Setattr, link, set.as_slice()).err(),
        Some(libc::ELOOP)
    );
}

#[test]
fn new_files_belong_to_the_caller_whose_supplementary_groups_count() {
    need_root();
    let mut guest = Guest::new();
    // Only root may write here. The guest's kernel has let the caller in, by a group that the host does not hear of.
    fs::create_dir(guest.path("shared")).unwrap();
    fs::set_permissions(guest.path("shared"), fs::Permissions::from_mode(0o770)).unwrap();
    let dir = guest.walk("shared");
    (guest.uid, guest.gid) = (1234, 2345);
    guest.create(dir, "file", libc::O_WRONLY, 0o666).unwrap();
    guest.mkdir(dir, "dir").unwrap();
    guest.mknod(dir, "fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    guest
        .call(Opcode::Symlink, dir, &[c("link"), c("x")].concat())
        .unwrap();
    for name in ["file", "dir", "fifo", "link"] {
        let metadata = fs::symlink_metadata(guest.path("shared").join(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1234, 2345), "{name}");
    }
    // Others' files are reached as the guest's kernel sees fit: it has checked.
    (guest.uid, guest.gid) = (0, 0);
    guest.create(dir, "roots", libc::O_WRONLY, 0o666).unwrap();
    assert_eq!(fs::metadata(guest.path("shared/roots")).unwrap().uid(), 0);
}

#[test]
fn writes_clear_privileges_when_the_guest_asks() {
    need_root();
    const KILL: u32 = 4;
    let mut guest = Guest::new();
    fs::write(guest.path("f"), "").unwrap();
    let node = guest.lookup(ROOT, "f").unwrap().nodeid;
    let open = guest.open(node, libc::O_WRONLY).unwrap();
    let mode = |guest: &Guest| fs::metadata(guest.path("f")).unwrap().mode() & 0o7777;
    fs::set_permissions(guest.path("f"), fs::Permissions::from_mode(0o6755)).unwrap();
    guest.write(node, open.fh, 0, b"x", 0).unwrap();
    assert_eq!(mode(&guest), 0o6755, "root's writes do not");
    guest.write_with(node, open.fh, 0, b"x", 0, KILL).unwrap();
    assert_eq!(mode(&guest), 0o755);

    fs::set_permissions(guest.path("f"), fs::Permissions::from_mode(0o4755)).unwrap();
    // FATTR_SIZE, FATTR_KILL_SUIDGID.
    let set = SetattrIn {
        valid: 8 | (1 << 11),
        ..SetattrIn::default()
    };
    guest.call(Opcode::Setattr, node, set.as_slice()).unwrap();
    assert_eq!(mode(&guest), 0o755);

    // The request to allocate has no word for it: who is not root has no right to keep them.
    fs::set_permissions(guest.path("f"), fs::Permissions::from_mode(0o4755)).unwrap();
    let allocate = FallocateIn {
        fh: open.fh,
        length: 100,
        ..FallocateIn::default()
    };
    guest
        .call(Opcode::Fallocate, node, allocate.as_slice())
        .unwrap();
    assert_eq!(mode(&guest), 0o4755);
    (guest.uid, guest.gid) = (1234, 2345);
    guest
        .call(Opcode::Fallocate, node, allocate.as_slice())
        .unwrap();
    assert_eq!(mode(&guest), 0o755);
}

#[test]
fn blocks_that_are_kept_for_root_are_not_for_others() {
    own_mounts();
    let mut guest = Guest::new();
    let images = TempDir::new().unwrap();
    let image = images.path().join("ext4");
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let done = |command: &mut Command| command.status().is_ok_and(|status| status.success());
    // Half of the blocks.
    let made = done(
        Command::new("mkfs.ext4")
            .args(["-q", "-m", "50"])
            .arg(&image),
    );
    fs::create_dir(guest.path("disk")).unwrap();
    let mut mount = Command::new("mount");
    let mount = mount.args(["-o", "loop"]).arg(&image);
    if !made || !done(mount.arg(guest.path("disk"))) {
        eprintln!("skipped: no loop device with an ext4");
        return;
    }
    let dir = guest.walk("disk");
    let (entry, open) = guest.create(dir, "file", libc::O_RDWR, 0o666).unwrap();
    let node = entry.nodeid;
    let data = vec![1; 1 << 20];
    let write = |guest: &mut Guest, at: u64| guest.write(node, open.fh, at << 20, &data, 0);
    let allocate = |guest: &mut Guest, at: u64| {
        let fallocate = FallocateIn {
            fh: open.fh,
            offset: at << 20,
            length: 1 << 20,
            ..FallocateIn::default()
        };
        guest.call(Opcode::Fallocate, node, fallocate.as_slice())
    };
    (guest.uid, guest.gid) = (1234, 2345);
    let full = (0..4).find(|at| write(&mut guest, *at) != Ok(1 << 20));
    let full = full.expect("root's blocks were taken");
    assert_eq!(write(&mut guest, full + 1), Err(libc::ENOSPC));
    assert_eq!(allocate(&mut guest, full + 1), Err(libc::ENOSPC));
    (guest.uid, guest.gid) = (0, 0);
    assert_eq!(write(&mut guest, full + 1), Ok(1 << 20));
    allocate(&mut guest, full + 2).unwrap();
    umount2(&guest.path("disk"), MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn extended_attributes_of_users_are_shared_and_the_hosts_are_not() {
    let mut guest = Guest::new();
    fs::write(guest.path("f"), "").unwrap();
    let node = guest.lookup(ROOT, "f").unwrap().nodeid;
    let set = |guest: &mut Guest, name: &str, value: &[u8]| {
        let set = SetxattrIn {
            size: value.len() as u32,
            flags: 0,
        };
        guest.call(
            Opcode::Setxattr,
            node,
            &[set.as_slice(), &c(name), value].concat(),
        )
    };
    let get = |guest: &mut Guest, name: &str, size: u32| {
        let get = GetxattrIn { size, padding: 0 };
        guest.call(Opcode::Getxattr, node, &[get.as_slice(), &c(name)].concat())
    };
    match set(&mut guest, "user.colour", b"blue") {
        Err(libc::EOPNOTSUPP) => {
            // Not by a macro, whose output the test's runner keeps to itself.
            let test = std::thread::current();
            let test = test.name().unwrap();
            let why = "the file system has no extended attributes";
            writeln!(io::stderr(), "SKIPPED: {test}: {why}").unwrap();
            return;
        }
        answer => drop(answer.unwrap()),
    }
    assert_eq!(get(&mut guest, "user.colour", 100).unwrap(), b"blue");
    assert_eq!(
        get(&mut guest, "user.colour", 0).unwrap()[..4],
        4u32.to_le_bytes()
    );
    assert_eq!(get(&mut guest, "user.colour", 2).err(), Some(libc::ERANGE));
    assert_eq!(
        get(&mut guest, "user.missing", u32::MAX).err(),
        Some(libc::ENODATA)
    );
    for name in [
        "trusted.overlay.opaque",
        "security.selinux",
        "security.ima",
        "system.x",
    ] {
        assert_eq!(
            set(&mut guest, name, b"x").err(),
            Some(libc::EOPNOTSUPP),
            "{name}"
        );
        assert_eq!(
            get(&mut guest, name, 10).err(),
            Some(libc::EOPNOTSUPP),
            "{name}"
        );
        assert_eq!(
            guest.call(Opcode::Removexattr, node, &c(name)).err(),
            Some(libc::EOPNOTSUPP)
        );
    }
    let list = |guest: &mut Guest, size| {
        let get = GetxattrIn { size, padding: 0 };
        guest.call(Opcode::Listxattr, node, get.as_slice())
    };
    assert_eq!(list(&mut guest, 100).unwrap(), b"user.colour\0");
    assert_eq!(list(&mut guest, 5).err(), Some(libc::ERANGE));
    guest
        .call(Opcode::Removexattr, node, &c("user.colour"))
        .unwrap();
    assert_eq!(list(&mut guest, u32::MAX).unwrap(), b"");
}

fn keeps_pages(guest: &mut Guest, node: u64) -> bool {
    let open = guest.open(node, libc::O_RDONLY).unwrap();
    OpenOptions::from_bits_truncate(open.open_flags).contains(OpenOptions::KEEP_CACHE)
}

#[test]
fn an_access_list_ends_a_set_group_id_bit_when_the_guest_asks() {
    const KILL_SGID: u64 = 1;
    let mut guest = Guest::new();
    fs::create_dir(guest.path("d")).unwrap();
    fs::set_permissions(guest.path("d"), fs::Permissions::from_mode(0o2755)).unwrap();
    let node = guest.lookup(ROOT, "d").unwrap().nodeid;
    // Version 2; tag, permissions and id of: the owner, a user, the group, the mask, all others.
    let none = u32::MAX;
    let entries = [
        (1u16, 7u16, none),
        (2, 7, 1234),
        (4, 5, none),
        (16, 7, none),
        (32, 5, none),
    ];
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    let name = c("system.posix_acl_access");
    let set = |guest: &mut Guest, flags: u64, size: u32| {
        let set = SetxattrIn { size, flags: 0 };
        let body = [set.as_slice(), &flags.to_le_bytes(), &name, &list].concat();
        guest.call(Opcode::Setxattr, node, &body).map(|_| ())
    };
    let mode = |guest: &Guest| fs::metadata(guest.path("d")).unwrap().mode() & 0o7777;
    let size = list.len() as u32;
    if set(&mut guest, 0, size) == Err(libc::EOPNOTSUPP) {
        eprintln!("skipped: the file system has no access control lists");
        return;
    }
    assert_eq!(mode(&guest), 0o2775);
    assert_eq!(set(&mut guest, KILL_SGID, size + 1), Err(libc::EINVAL));
    assert_eq!(mode(&guest), 0o2775);
    set(&mut guest, KILL_SGID, size).unwrap();
    assert_eq!(mode(&guest), 0o775);
}

#[test]
fn pages_are_kept_over_an_open_only_if_the_file_is_unchanged() {
    // Files that have been as they are for a while.
    let mut guest = Guest::sharing(env!("CARGO_MANIFEST_DIR"));
    let node = guest.lookup(ROOT, "Cargo.toml").unwrap().nodeid;
    assert!(!keeps_pages(&mut guest, node), "first seen");
    assert!(keeps_pages(&mut guest, node));

    let mut guest = Guest::new();
    fs::write(guest.path("f"), "one").unwrap();
    let node = guest.lookup(ROOT, "f").unwrap().nodeid;
    assert!(!keeps_pages(&mut guest, node), "first seen");
    fs::write(guest.path("f"), "other").unwrap();
    assert!(!keeps_pages(&mut guest, node), "changed by the host");
}

#[test]
fn a_file_that_has_just_changed_may_change_again_without_a_trace() {
    let stamp = |ctime, now| Stamp::of(5, (1, 0), ctime, now).is_some();
    const TICK: i64 = 10_000_000;
    assert!(!stamp((100, 7), (100, 7)));
    assert!(!stamp((100, 7), (100, 7 + TICK)));
    assert!(stamp((100, 7), (100, 8 + 2 * TICK)));
    assert!(!stamp((100, 999_999_999), (101, TICK)));
    assert!(stamp((100, 999_999_999), (101, 3 * TICK)));
    // Some file systems count seconds, or two at a time.
    assert!(!stamp((100, 0), (101, 0)));
    assert!(stamp((100, 0), (103, 0)));
    // The host of a file system may have a clock of its own.
    assert!(!stamp((200, 7), (100, 7)));
}

#[test]
fn names_are_single_components() {
    let mut guest = Guest::new();
    fs::create_dir(guest.path("sub")).unwrap();
    fs::write(guest.path("sub/f"), "").unwrap();
    let sub = guest.lookup(ROOT, "sub").unwrap().nodeid;
    let long = "x".repeat(256);
    let cases = [
        ("", libc::EINVAL),
        (".", libc::EINVAL),
        ("..", libc::EINVAL),
        ("sub/f", libc::EINVAL),
        ("/", libc::EINVAL),
        ("/etc/passwd", libc::EINVAL),
        ("../../etc/passwd", libc::EINVAL),
        ("sub/", libc::EINVAL),
        (&long, libc::ENAMETOOLONG),
    ];
    for (name, errno) in cases {
        for parent in [ROOT, sub] {
            let wrong = Some(errno);
            assert_eq!(guest.lookup(parent, name).err(), wrong, "lookup {name:?}");
            assert_eq!(
                guest.create(parent, name, libc::O_RDWR, 0o600).err(),
                wrong,
                "create {name:?}"
            );
            assert_eq!(guest.mkdir(parent, name).err(), wrong, "mkdir {name:?}");
            assert_eq!(
                guest.mknod(parent, name, libc::S_IFREG, 0).err(),
                wrong,
                "mknod {name:?}"
            );
            assert_eq!(
                guest.call(Opcode::Unlink, parent, &c(name)).err(),
                wrong,
                "unlink {name:?}"
            );
            assert_eq!(
                guest.call(Opcode::Rmdir, parent, &c(name)).err(),
                wrong,
                "rmdir {name:?}"
            );
            let link = LinkIn { oldnodeid: sub };
            let body = [link.as_slice(), &c(name)].concat();
            assert_eq!(
                guest.call(Opcode::Link, parent, &body).err(),
                wrong,
                "link {name:?}"
            );
            for names in [[c(name), c("ok")], [c("ok"), c(name)]] {
                let rename = RenameIn { newdir: ROOT };
                let body = [rename.as_slice(), &names.concat()].concat();
                assert_eq!(
                    guest.call(Opcode::Rename, parent, &body).err(),
                    wrong,
                    "rename {name:?}"
                );
            }
            if !name.is_empty() {
                let body = [c(name), c("target")].concat();
                assert_eq!(
                    guest.call(Opcode::Symlink, parent, &body).err(),
                    wrong,
                    "symlink {name:?}"
                );
            }
        }
    }
}

#[test]
fn special_files_are_shown_and_never_opened() {
    need_root();
    let mut guest = Guest::new();
    let null = libc::makedev(1, 3) as u32;
    let kinds = [
        ("fifo", libc::S_IFIFO, 0),
        ("null", libc::S_IFCHR, null),
        ("disk", libc::S_IFBLK, libc::makedev(254, 0) as u32),
        ("socket", libc::S_IFSOCK, 0),
    ];
    for (name, kind, rdev) in kinds {
        let entry = guest.mknod(ROOT, name, kind | 0o666, rdev).unwrap();
        assert_eq!(entry.attr.mode & libc::S_IFMT, kind);
        assert_eq!(entry.attr.rdev, rdev);
        // A FIFO without a reader would block the thread for ever, if it were opened.
        for flags in [
            libc::O_RDONLY,
            libc::O_WRONLY,
            libc::O_RDWR | libc::O_NONBLOCK,
            libc::O_PATH,
        ] {
            assert_eq!(
                guest.open(entry.nodeid, flags).err(),
                Some(libc::ENXIO),
                "{name}"
            );
        }
        assert_eq!(
            guest.create(ROOT, name, libc::O_WRONLY, 0o600).err(),
            Some(libc::ESTALE)
        );
        assert_eq!(guest.opendir(entry.nodeid).err(), Some(libc::ENOTDIR));
        let truncate = SetattrIn {
            valid: 8,
            ..SetattrIn::default()
        };
        assert_eq!(
            guest
                .call(Opcode::Setattr, entry.nodeid, truncate.as_slice())
                .err(),
            Some(libc::ENXIO)
        );
    }
    let metadata = fs::metadata(guest.path("null")).unwrap();
    assert!(metadata.file_type().is_char_device());
    // One for each mknod, and the root.
    assert_eq!(guest.known(), 1 + kinds.len());
}

#[test]
fn symbolic_links_lead_nowhere_on_the_host() {
    let mut guest = Guest::new();
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    symlink(outside.path().join("secret"), guest.path("file")).unwrap();
    symlink(outside.path(), guest.path("dir")).unwrap();
    symlink("/proc/self/root", guest.path("magic")).unwrap();

    for name in ["file", "dir", "magic"] {
        let entry = guest.lookup(ROOT, name).unwrap();
        assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(
            guest.open(entry.nodeid, libc::O_RDONLY).err(),
            Some(libc::ELOOP)
        );
        assert_eq!(guest.opendir(entry.nodeid).err(), Some(libc::ENOTDIR));
        assert_eq!(
            guest.lookup(entry.nodeid, "secret").err(),
            Some(libc::ENOTDIR)
        );
        assert_eq!(guest.mkdir(entry.nodeid, "new").err(), Some(libc::ENOTDIR));
        for flags in [
            0,
            libc::O_PATH,
            libc::O_PATH | libc::O_EXCL,
            libc::O_TRUNC | libc::O_WRONLY,
        ] {
            assert!(
                guest.create(ROOT, name, flags, 0o600).is_err(),
                "{name} {flags:#x}"
            );
        }
        let chmod = SetattrIn {
            valid: 1,
            mode: 0o777,
            ..SetattrIn::default()
        };
        let _ = guest.call(Opcode::Setattr, entry.nodeid, chmod.as_slice());
    }
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"secret");
    assert_eq!(
        fs::metadata(outside.path().join("secret")).unwrap().mode() & 0o777,
        0o644
    );
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);

    // A directory that the host turns into a link between two requests of the guest stays what was looked up.
    fs::create_dir(guest.path("d")).unwrap();
    let d = guest.lookup(ROOT, "d").unwrap().nodeid;
    fs::rename(guest.path("d"), guest.path("moved")).unwrap();
    symlink(outside.path(), guest.path("d")).unwrap();
    guest.create(d, "new", libc::O_WRONLY, 0o600).unwrap();
    assert!(guest.path("moved/new").exists());
    assert!(!outside.path().join("new").exists());
}

#[test]
fn flags_that_would_change_an_opens_meaning_are_dropped() {
    let mut guest = Guest::new();
    fs::write(guest.path("f"), "content").unwrap();
    let node = guest.lookup(ROOT, "f").unwrap().nodeid;
    let open = guest
        .open(
            node,
            libc::O_PATH | libc::O_DIRECTORY | libc::O_DIRECT | libc::O_CREAT | libc::O_ASYNC,
        )
        .unwrap();
    assert_eq!(guest.read(node, open.fh, 0, 7).unwrap(), b"content");
    assert_eq!(guest.open(node, libc::O_ACCMODE).err(), Some(libc::EINVAL));
    assert_eq!(
        guest.open(ROOT, libc::O_TMPFILE | libc::O_RDWR).err(),
        Some(libc::EISDIR)
    );
    assert_eq!(guest.open(ROOT, libc::O_RDONLY).err(), Some(libc::EISDIR));
    let (entry, open) = guest
        .create(
            ROOT,
            "g",
            libc::O_PATH | libc::O_TMPFILE | libc::O_RDWR,
            0o600,
        )
        .unwrap();
    assert_eq!(guest.write(entry.nodeid, open.fh, 0, b"x", 0), Ok(1));
}

#[test]
fn unknown_numbers_are_refused() {
    let mut guest = Guest::new();
    fs::write(guest.path("f"), "x").unwrap();
    fs::write(guest.path("g"), "y").unwrap();
    let f = guest.lookup(ROOT, "f").unwrap().nodeid;
    let g = guest.lookup(ROOT, "g").unwrap().nodeid;
    let open = guest.open(f, libc::O_RDWR).unwrap();
    let wrong = Some(libc::EBADF);
    for node in [0, 2_000, u64::MAX] {
        assert_eq!(guest.lookup(node, "f").err(), wrong);
        assert_eq!(guest.open(node, 0).err(), wrong);
        assert_eq!(guest.opendir(node).err(), wrong);
        assert_eq!(guest.call(Opcode::Getattr, node, &[0; 16]).err(), wrong);
        assert_eq!(guest.call(Opcode::Statfs, node, &[]).err(), wrong);
        assert_eq!(guest.call(Opcode::Readlink, node, &[]).err(), wrong);
        guest.forget(node, u64::MAX);
    }
    // A handle goes with its inode only.
    assert_eq!(guest.read(g, open.fh, 0, 1).err(), wrong);
    assert_eq!(guest.write(g, open.fh, 0, b"z", 0).err(), wrong);
    assert_eq!(guest.release(Opcode::Release, g, open.fh).err(), wrong);
    // Files are not directories, nor the reverse.
    let list = ReadIn {
        fh: open.fh,
        size: 4096,
        ..ReadIn::default()
    };
    assert_eq!(
        guest.call(Opcode::Readdir, f, list.as_slice()).err(),
        Some(libc::ENOTDIR)
    );
    let dir = guest.opendir(ROOT).unwrap();
    assert_eq!(guest.read(ROOT, dir.fh, 0, 10).err(), Some(libc::EISDIR));
}

#[test]
fn forgotten_inodes_are_closed_and_the_root_never_is() {
    let mut guest = Guest::new();
    fs::write(guest.path("f"), "x").unwrap();
    let node = guest.lookup(ROOT, "f").unwrap().nodeid;
    guest.lookup(ROOT, "f").unwrap();
    assert_eq!(guest.known(), 2);
    guest.forget(node, 1);
    assert_eq!(guest.known(), 2);
    guest.forget(node, u64::MAX);
    assert_eq!(guest.known(), 1);
    assert_eq!(guest.open(node, 0).err(), Some(libc::EBADF));
    guest.forget(ROOT, u64::MAX);
    assert_ne!(
        guest.lookup(ROOT, "f").unwrap().nodeid,
        node,
        "numbers are never used again"
    );
}

#[test]
fn open_files_are_bounded() {
    let dir = TempDir::new().unwrap();
    let share = Share::new(dir.path(), 4).unwrap();
    let context = Default::default();
    use fuse_backend_rs::api::filesystem::FileSystem;
    for name in ["a", "b", "c", "d"] {
        fs::write(dir.path().join(name), "").unwrap();
    }
    // The root is one.
    let a = share.lookup(&context, ROOT, c"a").unwrap().inode;
    share.lookup(&context, ROOT, c"b").unwrap();
    let (handle, ..) = share.open(&context, a, 0, 0).unwrap();
    let full =
        |result: io::Result<()>| assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENFILE));
    full(share.lookup(&context, ROOT, c"c").map(|_| ()));
    full(share.open(&context, a, 0, 0).map(|_| ()));
    full(share.opendir(&context, ROOT, 0).map(|_| ()));
    // Nor is anything made that could not be told of then.
    let create = CreateIn {
        flags: libc::O_RDWR as u32,
        mode: 0o600,
        umask: 0,
        fuse_flags: 0,
    };
    full(share.create(&context, ROOT, c"new", create).map(|_| ()));
    full(share.mkdir(&context, ROOT, c"new", 0o700, 0).map(|_| ()));
    full(share.symlink(&context, c"x", ROOT, c"new").map(|_| ()));
    let fifo = libc::S_IFIFO | 0o600;
    full(share.mknod(&context, ROOT, c"new", fifo, 0, 0).map(|_| ()));
    assert!(fs::symlink_metadata(dir.path().join("new")).is_err());
    // Known ones go on.
    share.lookup(&context, ROOT, c"a").unwrap();
    share
        .release(&context, a, 0, handle.unwrap(), false, false, None)
        .unwrap();
    // What is read ahead of a directory counts too.
    full(share.opendir(&context, ROOT, 0).map(|_| ()));
    share.forget(&context, a, 2);
    let (handle, _) = share.opendir(&context, ROOT, 0).unwrap();
    full(share.lookup(&context, ROOT, c"c").map(|_| ()));
    share
        .releasedir(&context, ROOT, 0, handle.unwrap())
        .unwrap();
    share.lookup(&context, ROOT, c"c").unwrap();
    share.lookup(&context, ROOT, c"d").unwrap();
}

#[test]
fn many_files_are_told_of_and_when_few_more_may_be_held_the_guest_keeps_none() {
    use fuse_backend_rs::api::filesystem::FileSystem;
    let dir = TempDir::new().unwrap();
    let share = Share::new(dir.path(), 16).unwrap();
    let look_up = |number: usize| {
        let name = number.to_string();
        fs::write(dir.path().join(&name), "").unwrap();
        let name = CString::new(name).unwrap();
        let found = share.lookup(&Default::default(), ROOT, &name).unwrap();
        (found.inode, found.entry_timeout, found.attr_timeout)
    };
    // The root is the first.
    for count in 2..=16 {
        let (_, name_time, attr_time) = look_up(count);
        let kept = if count <= 12 {
            share::CACHE_TIME
        } else {
            std::time::Duration::ZERO
        };
        assert_eq!((name_time, attr_time), (kept, share::CACHE_TIME), "{count}");
        let told = share.many_files().read().is_ok();
        assert_eq!(told, [8, 12, 14, 15, 16].contains(&count), "{count}");
    }
    // Known ones are not to be kept any longer either.
    let (inode, name_time, _) = look_up(2);
    assert_eq!(name_time, std::time::Duration::ZERO);
    share.forget(&Default::default(), inode, 2);
    for number in 3..8 {
        let (inode, ..) = look_up(number);
        share.forget(&Default::default(), inode, 2);
    }
    assert_eq!(look_up(8).1, share::CACHE_TIME);
}

#[test]
fn a_share_holds_no_more_files_than_it_is_configured_to() {
    let dir = TempDir::new().unwrap();
    let few = ShareConfig {
        files: 0,
        ..share(&dir)
    };
    // Not even the root.
    let error = Fs::new(&few).err().unwrap();
    assert!(matches!(
        error,
        FsError::Directory { ref source, .. } if source.raw_os_error() == Some(libc::ENFILE)
    ));
}

#[test]
fn absurd_messages_are_survived() {
    let mut guest = Guest::new();
    fs::write(guest.path("f"), "x").unwrap();
    let node = guest.lookup(ROOT, "f").unwrap().nodeid;
    let _open = guest.open(node, libc::O_RDWR).unwrap();

    // Every opcode with every short length, with and without room for a reply.
    for opcode in (0..60).chain([4096, 1_048_576, u32::MAX]) {
        for len in [0, 1, 7, 8, 16, 40, 64, 200] {
            for room in [0, 8, 16, 64, 4096] {
                let header = guest.header(opcode, node, len);
                let body: Vec<u8> = (0..len).map(|i| (i * 37 + opcode as usize) as u8).collect();
                guest.exchange(&[header.as_slice(), &body].concat(), room);
            }
        }
    }
    // Lengths that lie.
    for len in [0, 1, 39, 40, 41, 1 << 20, u32::MAX] {
        for opcode in [
            Opcode::Lookup,
            Opcode::Setxattr,
            Opcode::Write,
            Opcode::BatchForget,
            Opcode::Ioctl,
        ] {
            let header = InHeader {
                len,
                ..guest.header(opcode as u32, ROOT, 0)
            };
            guest.exchange(&[header.as_slice(), &[0xff; 64]].concat(), 4096);
        }
    }
    // No header at all, no readable part, outside of memory, too long for any message.
    guest.exchange(&[1, 2, 3], 4096);
    for pieces in [
        vec![Piece::write(REPLY, 4096)],
        vec![Piece::read(MEMORY as u64 - 10, 100)],
        vec![Piece::read(u64::MAX - 10, 100)],
        (0..200)
            .map(|_| Piece::read(REQUEST, MEMORY - REQUEST as usize))
            .collect(),
        vec![
            Piece::read(REQUEST, 40),
            Piece::write(REPLY, u32::MAX as usize),
        ],
    ] {
        guest.requests.post(&pieces).unwrap();
        guest.requests.notify();
        guest.requests.wait(&guest.line);
    }
    // A DESTROY was among them, and who knows what became of the file.
    fs::write(guest.path("f"), "x").unwrap();
    let node = guest.lookup(ROOT, "f").unwrap().nodeid;
    let open = guest.open(node, libc::O_RDWR).unwrap();
    // Sizes that lie.
    assert_eq!(
        guest
            .read(node, open.fh, 0, u32::MAX)
            .map(|data| data.len()),
        Ok(1)
    );
    assert!(guest.read(node, open.fh, u64::MAX, 10).is_err());
    let write = WriteIn {
        fh: open.fh,
        size: u32::MAX,
        ..WriteIn::default()
    };
    let out: WriteOut = guest
        .call_for(Opcode::Write, node, &[write.as_slice(), b"abc"].concat())
        .unwrap();
    assert_eq!(out.size, 3);

    // A second INIT is lawful.
    guest.init();
    assert_eq!(fs::read(guest.path("f")).unwrap(), b"abc");
}

#[test]
fn a_driver_that_breaks_its_ring_is_ignored_and_the_device_still_stops() {
    let mut guest = Guest::new();
    guest.requests.set_avail_idx(RING + 77);
    guest.requests.kick();
    guest.high.set_avail_idx(5000);
    guest.high.kick();
    guest.fs.reset();
}

/// A lease on a file: to open it for writing takes until the lease is gone.
struct Lease(fs::File);

impl Lease {
    /// Takes one, whose breaking this thread alone is told of.
    fn take(path: &Path) -> Self {
        let file = fs::File::open(path).unwrap();
        let fd = file.as_raw_fd();
        Self::signal().thread_block().unwrap();
        let owner = [0 /* F_OWNER_TID */, nix::unistd::gettid().as_raw()];
        // SAFETY: the descriptor is open, and the owner is what F_SETOWN_EX reads: its kind and its number.
        unsafe {
            assert_eq!(libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK), 0);
            assert_eq!(libc::fcntl(fd, 15 /* F_SETOWN_EX */, owner.as_ptr()), 0);
        }
        Self(file)
    }

    fn signal() -> SigSet {
        SigSet::from_iter([Signal::SIGIO])
    }

    /// Returns when somebody waits for its end.
    fn contested(&self) {
        let patience = libc::timespec {
            tv_sec: mock_driver::PATIENCE.as_secs() as i64,
            tv_nsec: 0,
        };
        let set = Self::signal();
        // SAFETY: a set and a time that outlive the call; nothing is written.
        let signal =
            unsafe { libc::sigtimedwait(set.as_ref(), std::ptr::null_mut(), &raw const patience) };
        assert_eq!(signal, libc::SIGIO, "nobody opens the file");
    }

    fn give_back(self) {
        // SAFETY: the descriptor is open.
        let done = unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
        assert_eq!(done, 0);
    }
}

#[test]
fn slow_requests_do_not_hold_up_the_others() {
    const SLOW: u64 = 7;
    let mut guest = Guest::new();
    fs::write(guest.path("f"), "x").unwrap();
    let open = OpenIn {
        flags: libc::O_RDWR as u32,
        fuse_flags: 0,
    };
    let mut leases = Vec::new();
    let mut slow = std::collections::HashSet::new();
    for i in 0..SLOW {
        let name = format!("slow-{i}");
        fs::write(guest.path(&name), "x").unwrap();
        let node = guest.lookup(ROOT, &name).unwrap().nodeid;
        let lease = Lease::take(&guest.path(&name));
        slow.insert(guest.put(i, Opcode::Open, node, open.as_slice()));
        guest.requests.notify();
        lease.contested();
        leases.push(lease);
    }
    let quick = guest.put(SLOW, Opcode::Lookup, ROOT, &c("f"));
    guest.requests.notify();
    assert_eq!(guest.requests.wait(&guest.line).0, quick);
    leases.into_iter().for_each(Lease::give_back);
    while !slow.is_empty() {
        assert!(slow.remove(&guest.requests.wait(&guest.line).0));
    }
}

#[test]
fn threads_are_there_when_they_are_needed() {
    let mut guest = Guest::new();
    fs::write(guest.path("f"), "x").unwrap();
    for _ in 0..10 {
        guest.lookup(ROOT, "f").unwrap();
    }
    // One that works, one that waits.
    assert_eq!(guest.fs.threads(), 2);
}

#[test]
fn requests_that_come_at_once_are_all_answered() {
    let mut guest = Guest::new();
    fs::write(guest.path("f"), "x").unwrap();
    let mut heads = std::collections::HashSet::new();
    for i in 0..50 {
        heads.insert(guest.put(i, Opcode::Lookup, ROOT, &c("f")));
    }
    guest.requests.notify();
    while !heads.is_empty() {
        let (head, len) = guest.requests.wait(&guest.line);
        assert!(heads.remove(&head));
        assert_eq!(len as usize, size_of::<OutHeader>() + size_of::<EntryOut>());
    }
    assert_eq!(guest.known(), 2);
}

#[test]
fn a_reset_forgets_everything_and_the_device_starts_again() {
    let mut guest = Guest::new();
    fs::write(guest.path("f"), "x").unwrap();
    let node = guest.lookup(ROOT, "f").unwrap().nodeid;
    guest.open(node, 0).unwrap();
    guest.fs.reset();
    assert_eq!(guest.known(), 1);

    let rings = vec![0; REQUEST as usize];
    guest
        .memory
        .memory()
        .write_slice(&rings, GuestAddress(0))
        .unwrap();
    guest.high = Ring::new(&guest.memory, HIGH, RING);
    guest.requests = Ring::new(&guest.memory, REQUESTS, RING);
    guest.activate();
    guest.init();
    assert_eq!(guest.open(node, 0).err(), Some(libc::EBADF));
    guest.lookup(ROOT, "f").unwrap();
}

/// A mount namespace of a test's own: the device's threads are made by this thread and inherit it.
fn own_mounts() {
    need_root();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
}

#[test]
fn what_a_kernel_makes_up_is_read_past_the_guests_cache() {
    own_mounts();
    let mut guest = Guest::new();
    let path = guest.path("version");
    fs::write(&path, "").unwrap();
    let direct = |open: &OpenOut| {
        OpenOptions::from_bits_truncate(open.open_flags).contains(OpenOptions::DIRECT_IO)
    };
    let empty = guest.lookup(ROOT, "version").unwrap().nodeid;
    assert!(!direct(&guest.open(empty, libc::O_RDONLY).unwrap()));
    let none: Option<&str> = None;
    mount(Some("/proc/version"), &path, none, MsFlags::MS_BIND, none).unwrap();
    let node = guest.lookup(ROOT, "version").unwrap().nodeid;
    let open = guest.open(node, libc::O_RDONLY).unwrap();
    assert!(direct(&open));
    let version = fs::read("/proc/version").unwrap();
    assert_eq!(guest.read(node, open.fh, 0, 4096).unwrap(), version);

    // One whose size says the wrong thing.
    let value = guest.path("value");
    fs::write(&value, "").unwrap();
    mount(
        Some("/sys/kernel/fscaps"),
        &value,
        none,
        MsFlags::MS_BIND,
        none,
    )
    .unwrap();
    assert_eq!(fs::metadata(&value).unwrap().len(), 4096);
    let fscaps = guest.lookup(ROOT, "value").unwrap().nodeid;
    assert!(direct(&guest.open(fscaps, libc::O_RDONLY).unwrap()));
    umount2(&value, MntFlags::MNT_DETACH).unwrap();

    // No list of users, and no failure either, which would be one for everybody who asks for the file.
    let get = GetxattrIn {
        size: 100,
        padding: 0,
    };
    let name = c("system.posix_acl_access");
    let list = guest.call(Opcode::Getxattr, node, &[get.as_slice(), &name].concat());
    assert_eq!(list.err(), Some(libc::ENODATA));
    umount2(&path, MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn links_that_a_kernel_makes_up_are_read_anew() {
    let mut guest = Guest::sharing("/proc");
    let file = fs::File::open("/dev/null").unwrap();
    let folder = guest.walk(&format!("{}/fd", std::process::id()));
    let known = guest.known();
    let target = |guest: &mut Guest| {
        let link = guest.lookup(folder, &file.as_raw_fd().to_string()).unwrap();
        // The name is not to be believed, and what is known of the link under this number is not to be kept.
        assert_eq!((link.entry_valid, link.entry_valid_nsec), (0, 0));
        (
            link.nodeid,
            guest.call(Opcode::Readlink, link.nodeid, &[]).unwrap(),
        )
    };
    let (first, null) = target(&mut guest);
    // SAFETY: the number is this test's own.
    unsafe { nix::unistd::dup2_raw(fs::File::open("/dev/zero").unwrap(), file.as_raw_fd()) }
        .map(IntoRawFd::into_raw_fd)
        .unwrap();
    let (second, zero) = target(&mut guest);
    assert_ne!(first, second);
    assert_eq!((null, zero), (b"/dev/null".into(), b"/dev/zero".into()));
    guest.forget(first, 1);
    guest.forget(second, 1);
    assert_eq!(guest.known(), known);
}

#[test]
fn the_memory_of_the_vmm_is_closed_to_its_guest() {
    let mut guest = Guest::sharing("/proc");
    let task = format!("{0}/task/{0}", std::process::id());
    let process = std::process::id().to_string();
    for folder in [&process, &task] {
        let folder = guest.walk(folder);
        for (name, flags) in [
            ("mem", libc::O_RDWR),
            ("mem", libc::O_RDONLY),
            ("maps", libc::O_RDONLY),
            ("smaps", libc::O_RDONLY),
            ("auxv", libc::O_RDONLY),
        ] {
            let node = guest.lookup(folder, name).unwrap().nodeid;
            assert_eq!(guest.open(node, flags).err(), Some(libc::EACCES), "{name}");
        }
        let status = guest.lookup(folder, "status").unwrap().nodeid;
        let open = guest.open(status, libc::O_RDONLY).unwrap();
        assert!(
            guest
                .read(status, open.fh, 0, 4096)
                .unwrap()
                .starts_with(b"Name:")
        );
    }
    let mappings = guest.walk(&format!("{process}/map_files"));
    assert_eq!(guest.opendir(mappings).err(), Some(libc::EACCES));
    // Elsewhere the names mean nothing.
    let mut guest = Guest::new();
    fs::write(guest.path("mem"), "").unwrap();
    let node = guest.lookup(ROOT, "mem").unwrap().nodeid;
    guest.open(node, libc::O_RDWR).unwrap();
}

#[test]
fn mounts_below_the_share_belong_to_it_and_are_told_apart() {
    own_mounts();
    let none: Option<&str> = None;
    let mut guest = Guest::new();
    for name in ["one", "two", "bind", "readonly"] {
        fs::create_dir(guest.path(name)).unwrap();
    }
    let one = guest.lookup(ROOT, "one").unwrap();
    // The guest has seen the directory before something is mounted there.
    for name in ["one", "two"] {
        mount(
            Some("tmpfs"),
            &guest.path(name),
            Some("tmpfs"),
            MsFlags::empty(),
            none,
        )
        .unwrap();
        fs::write(guest.path(name).join("file"), name).unwrap();
    }
    let mounted = guest.lookup(ROOT, "one").unwrap();
    assert_ne!(mounted.nodeid, one.nodeid);
    let a = guest.walk("one/file");
    let b = guest.walk("two/file");
    // New tmpfs instances number their files alike.
    let host = |name: &str| fs::metadata(guest.path(name)).unwrap();
    assert_eq!(host("one/file").ino(), host("two/file").ino());
    assert_ne!(a, b);
    let attr = |guest: &mut Guest, node| {
        let attr: AttrOut = guest.call_for(Opcode::Getattr, node, &[0; 16]).unwrap();
        attr.attr.ino
    };
    assert_ne!(
        attr(&mut guest, a),
        attr(&mut guest, b),
        "shown inode numbers differ"
    );
    let open = guest.open(b, 0).unwrap();
    assert_eq!(guest.read(b, open.fh, 0, 10).unwrap(), b"two");
    let listed = guest.list(mounted.nodeid, true, 4096);
    assert_eq!((listed[2].1, listed[2].2), (attr(&mut guest, a), a));

    // The same directory by two mounts, one of them read-only: what one allows, the other does not.
    mount(
        Some(&guest.path("one")),
        &guest.path("bind"),
        none,
        MsFlags::MS_BIND,
        none,
    )
    .unwrap();
    mount(
        Some(&guest.path("one")),
        &guest.path("readonly"),
        none,
        MsFlags::MS_BIND,
        none,
    )
    .unwrap();
    let remount = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, &guest.path("readonly"), none, remount, none).unwrap();
    let writable = guest.walk("bind/file");
    let readonly = guest.walk("readonly/file");
    // By the guest's inode its kernel finds sockets, FIFOs, locks and what is mapped: one file, one inode. Directories are in one
    // place each.
    assert_eq!(writable, a);
    assert_ne!(readonly, a);
    assert_ne!(guest.walk("bind"), mounted.nodeid);
    let dir = guest.walk("bind");
    let link = LinkIn { oldnodeid: a };
    let linked: EntryOut = guest
        .call_for(Opcode::Link, dir, &[link.as_slice(), &c("name")].concat())
        .unwrap();
    assert_eq!((linked.nodeid, linked.attr.nlink), (a, 2));
    guest.call(Opcode::Unlink, dir, &c("name")).unwrap();
    guest.open(writable, libc::O_RDWR).unwrap();
    assert_eq!(guest.open(readonly, libc::O_RDWR).err(), Some(libc::EROFS));
    let dir = guest.walk("readonly");
    assert_eq!(
        guest.create(dir, "new", libc::O_RDWR, 0o600).err(),
        Some(libc::EROFS)
    );
    assert_eq!(
        guest.call(Opcode::Unlink, dir, &c("file")).err(),
        Some(libc::EROFS)
    );
    for name in ["readonly", "bind", "two", "one"] {
        umount2(&guest.path(name), MntFlags::MNT_DETACH).unwrap();
    }
    assert_eq!(guest.lookup(ROOT, "one").unwrap().nodeid, one.nodeid);
}

/// Mounts an overlay without an index at the guest's `root`, where `a`, `b` and `c` are hard links in the lower layer. None where there is
/// no overlayfs. To be called with [`own_mounts`]; [`unmount_layers`] undoes it.
fn mount_layers(guest: &Guest) -> Option<TempDir> {
    let none: Option<&str> = None;
    let layers = TempDir::new().unwrap();
    mount(
        Some("tmpfs"),
        layers.path(),
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )
    .unwrap();
    let layer = |name: &str| layers.path().join(name);
    for name in ["lower", "upper", "work"] {
        fs::create_dir(layer(name)).unwrap();
    }
    fs::write(layer("lower/a"), "old").unwrap();
    for name in ["lower/b", "lower/c"] {
        fs::hard_link(layer("lower/a"), layer(name)).unwrap();
    }
    fs::create_dir(guest.path("root")).unwrap();
    let options = format!(
        "lowerdir={},upperdir={},workdir={},index=off",
        layer("lower").display(),
        layer("upper").display(),
        layer("work").display()
    );
    let mounted = mount(
        Some("o"),
        &guest.path("root"),
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    );
    if mounted.is_err() {
        eprintln!("skipped: no overlayfs");
        umount2(layers.path(), MntFlags::MNT_DETACH).unwrap();
        return None;
    }
    Some(layers)
}

fn unmount_layers(guest: &Guest, layers: &TempDir) {
    umount2(&guest.path("root"), MntFlags::MNT_DETACH).unwrap();
    umount2(layers.path(), MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn hard_links_that_cannot_be_compared_are_taken_for_files_of_their_own() {
    own_mounts();
    let guest = Guest::new();
    let Some(layers) = mount_layers(&guest) else {
        return;
    };
    // This thread's working directory is not where the comparison finds descriptors, so it fails, as it does where the host has no watch
    // left.
    let share = &guest.fs.share;
    let context = Context::default();
    let look_up = |parent, name: &CStr| share.lookup(&context, parent, name).unwrap().inode;
    let dir = look_up(ROOT, c"root");
    let nodes = [c"a", c"b", c"c"].map(|name| look_up(dir, name));
    let [a, b, c] = nodes;
    assert!(a != b && b != c && c != a, "{nodes:?}");
    let again = [c"a", c"b", c"c"].map(|name| look_up(dir, name));
    assert_eq!(nodes, again, "a name's inode stays the same");
    unmount_layers(&guest, &layers);
}

#[test]
fn hard_links_of_a_lower_layer_stay_the_same_files_under_other_names() {
    own_mounts();
    let mut guest = Guest::new();
    let Some(layers) = mount_layers(&guest) else {
        return;
    };
    let dir = guest.walk("root");
    let look_up = |guest: &mut Guest, name| guest.lookup(dir, name).unwrap().nodeid;
    let rename = |guest: &mut Guest, flags: u32, old, new| {
        // struct fuse_rename2_in: the new directory, flags, padding.
        let header = [dir, flags.into()].map(u64::to_le_bytes).concat();
        let body = [header, c(old), c(new)].concat();
        guest.call(Opcode::Rename2, dir, &body).unwrap();
    };
    // The only name that is known, and one of two.
    let a = look_up(&mut guest, "a");
    rename(&mut guest, 0, "a", "x");
    assert_eq!(look_up(&mut guest, "x"), a);
    let (b, c_) = (look_up(&mut guest, "b"), look_up(&mut guest, "c"));
    rename(&mut guest, libc::RENAME_EXCHANGE, "b", "c");
    assert_eq!(look_up(&mut guest, "b"), c_);
    assert_eq!(look_up(&mut guest, "c"), b);
    assert_eq!(look_up(&mut guest, "x"), a);
    assert!(a != b && b != c_ && c_ != a);
    unmount_layers(&guest, &layers);
}

#[test]
fn hard_links_of_a_lower_layer_are_files_of_their_own() {
    own_mounts();
    let mut guest = Guest::new();
    let Some(layers) = mount_layers(&guest) else {
        return;
    };
    // The host shows one inode number for all of them, and means another inode for each.
    let merged = guest.path("root");
    let host = |name: &str| fs::metadata(merged.join(name)).unwrap();
    assert_eq!((host("a").ino(), host("a").nlink()), (host("b").ino(), 3));
    let dir = guest.walk("root");
    let nodes = ["a", "b", "c"].map(|name| guest.lookup(dir, name).unwrap().nodeid);
    let again = ["a", "b", "c"].map(|name| guest.lookup(dir, name).unwrap().nodeid);
    assert_eq!(nodes, again, "a name's inode stays the same");
    let [a, b, c_] = nodes;
    assert!(a != b && b != c_ && c_ != a, "{nodes:?}");

    let open = guest.open(b, libc::O_WRONLY).unwrap();
    guest.write(b, open.fh, 0, b"new", 0).unwrap();
    let read = |name: &str| fs::read(guest.path("root").join(name)).unwrap();
    assert_eq!(
        (read("a"), read("b"), read("c")),
        (b"old".into(), b"new".into(), b"old".into())
    );
    guest.release(Opcode::Release, b, open.fh).unwrap();

    // What is forgotten is known no more. The one that was written to is still found by its name, and hard links of it, which are in the
    // upper layer, are one file with it.
    guest.forget(a, 2);
    guest.forget(c_, 2);
    assert_eq!(guest.known(), 3);
    assert_ne!(host("b").ino(), host("a").ino());
    assert_eq!(guest.lookup(dir, "b").unwrap().nodeid, b);
    let link = LinkIn { oldnodeid: b };
    let linked: EntryOut = guest
        .call_for(Opcode::Link, dir, &[link.as_slice(), &c("d")].concat())
        .unwrap();
    assert_eq!((linked.nodeid, linked.attr.nlink), (b, 2));
    for name in ["d", "b", "d"] {
        assert_eq!(guest.lookup(dir, name).unwrap().nodeid, b);
    }
    fs::hard_link(guest.path("root/d"), guest.path("root/e")).unwrap();
    fs::write(guest.path("root/x"), "").unwrap();
    fs::hard_link(guest.path("root/x"), guest.path("root/y")).unwrap();
    assert_eq!(guest.lookup(dir, "e").unwrap().nodeid, b);
    let x = guest.lookup(dir, "x").unwrap().nodeid;
    assert_eq!(guest.lookup(dir, "y").unwrap().nodeid, x);
    fs::remove_file(guest.path("root/y")).unwrap();
    assert_eq!(guest.lookup(dir, "x").unwrap().nodeid, x);
    assert_ne!(guest.lookup(dir, "a").unwrap().nodeid, b);
    assert_ne!(guest.lookup(dir, "c").unwrap().nodeid, b);
    unmount_layers(&guest, &layers);
}

#[test]
fn what_is_mounted_first_below_the_share_keeps_its_inode_numbers() {
    own_mounts();
    let none: Option<&str> = None;
    let mut guest = Guest::new();
    for name in ["root", "volume"] {
        fs::create_dir(guest.path(name)).unwrap();
    }
    // The share's own directory has been looked into before.
    guest.list(ROOT, true, 4096);
    for name in ["root", "volume"] {
        mount(
            Some("tmpfs"),
            &guest.path(name),
            Some("tmpfs"),
            MsFlags::empty(),
            none,
        )
        .unwrap();
        fs::write(guest.path(name).join("file"), name).unwrap();
    }
    let ino = |guest: &mut Guest, path: &str| {
        let node = guest.walk(path);
        let attr: AttrOut = guest.call_for(Opcode::Getattr, node, &[0; 16]).unwrap();
        attr.attr.ino
    };
    // A program of 32 bits without support for large files can't be told a number that is longer.
    let shown = ino(&mut guest, "root/file");
    assert_eq!(shown, fs::metadata(guest.path("root/file")).unwrap().ino());
    let shown = [
        shown,
        ino(&mut guest, "volume/file"),
        ino(&mut guest, "root"),
        ino(&mut guest, "volume"),
    ];
    let different: std::collections::HashSet<_> = shown.iter().collect();
    assert_eq!(different.len(), shown.len());
    for name in ["root", "volume"] {
        umount2(&guest.path(name), MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn the_files_of_every_mount_are_written_back_when_the_guest_asks() {
    own_mounts();
    let none: Option<&str> = None;
    let mut guest = Guest::new();
    for name in ["one", "two"] {
        fs::create_dir(guest.path(name)).unwrap();
        mount(
            Some("tmpfs"),
            &guest.path(name),
            Some("tmpfs"),
            MsFlags::empty(),
            none,
        )
        .unwrap();
        fs::create_dir(guest.path(name).join("dir")).unwrap();
    }
    fs::write(guest.path("two/file"), "").unwrap();
    fs::write(guest.path("file"), "").unwrap();
    mount(
        Some(&guest.path("two/file")),
        &guest.path("file"),
        none,
        MsFlags::MS_BIND,
        none,
    )
    .unwrap();
    for name in ["one/dir", "file"] {
        guest.walk(name);
    }
    // A directory of the share's own, one of the first mount, and the one file that is known of the second.
    let kinds: Vec<_> = guest
        .fs
        .share
        .file_systems()
        .iter()
        .map(|inode| inode.kind)
        .collect();
    let directories = kinds.iter().filter(|kind| **kind == libc::S_IFDIR).count();
    assert_eq!((kinds.len(), directories), (3, 2));

    let syncfs = |guest: &mut Guest| {
        let header = guest.header(50 /* FUSE_SYNCFS */, ROOT, 8);
        guest.exchange(&[header.as_slice(), &[0; 8]].concat(), ROOM)
    };
    let reply = syncfs(&mut guest);
    let header: OutHeader = read(&reply);
    assert_eq!((header.error, header.unique), (0, guest.unique));
    assert_eq!(header.len as usize, reply.len());
    for name in ["file", "two", "one"] {
        umount2(&guest.path(name), MntFlags::MNT_DETACH).unwrap();
    }
}

/// The capabilities that this process's file-system threads may use.
fn capabilities_of_threads() -> Vec<u64> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    // Other tests' threads come and go.
    let statuses =
        tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok());
    let of_threads = statuses.filter(|status| status.starts_with("Name:\tfs-"));
    let permitted = of_threads.map(|status| {
        let (_, rest) = status.split_once("CapPrm:\t").unwrap();
        u64::from_str_radix(&rest[..16], 16).unwrap()
    });
    permitted.collect()
}

#[test]
fn threads_have_the_capabilities_that_files_take_and_no_others() {
    own_mounts();
    let mut guest = Guest::new();
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
    let wanted: u64 = [0, 1, 3, 4, 6, 7, 27, 31].map(|bit| 1 << bit).iter().sum();
    let found = capabilities_of_threads();
    assert!(!found.is_empty());
    for capabilities in found {
        assert_eq!(capabilities, wanted, "{capabilities:#x}");
    }

    // The memory of a process with more rights is not a container's to read, though it is root's.
    fs::create_dir(guest.path("proc")).unwrap();
    let none: Option<&str> = None;
    mount(
        Some("/proc"),
        &guest.path("proc"),
        none,
        MsFlags::MS_BIND,
        none,
    )
    .unwrap();
    let mut process = std::process::Command::new("cat")
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let memory = format!("proc/{}/mem", process.id());
    fs::File::open(format!("/{memory}")).unwrap();
    let memory = guest.walk(&memory);
    assert_eq!(guest.open(memory, libc::O_RDONLY).err(), Some(libc::EACCES));
    drop(process.stdin.take());
    process.wait().unwrap();
    umount2(&guest.path("proc"), MntFlags::MNT_DETACH).unwrap();

    // File capabilities are set and kept, as are owners.
    fs::write(guest.path("f"), "").unwrap();
    let node = guest.lookup(ROOT, "f").unwrap().nodeid;
    // FATTR_UID, FATTR_GID.
    let owner = SetattrIn {
        valid: 2 | 4,
        uid: 1234,
        gid: 2345,
        ..SetattrIn::default()
    };
    guest.call(Opcode::Setattr, node, owner.as_slice()).unwrap();
    let value = [&[1, 0, 0, 2][..], &[0; 16]].concat();
    let set = SetxattrIn {
        size: value.len() as u32,
        flags: 0,
    };
    let name = c("security.capability");
    let body = [set.as_slice(), &name, &value].concat();
    guest.call(Opcode::Setxattr, node, &body).unwrap();
    let get = GetxattrIn {
        size: 100,
        padding: 0,
    };
    let found = guest.call(Opcode::Getxattr, node, &[get.as_slice(), &name].concat());
    assert_eq!(found.unwrap(), value);
    assert_eq!(fs::metadata(guest.path("f")).unwrap().uid(), 1234);
}

/// One random request, well-formed in its outline. Returns the inode and handle that the reply names, if any.
fn random_request(
    guest: &mut Guest,
    nodes: &[u64],
    handles: &[u64],
    random: &mut Random,
) -> (u64, u64) {
    const NAMES: [&str; 9] = ["a", "b", "c", "dir", "..", "../canary", "a/b", "", "link"];
    // The fixed parts of requests are at most this long; longer ones are payload.
    const FIXED: [usize; 8] = [0, 4, 8, 16, 24, 32, 40, 88];
    let opcode = random.pick(&[
        Opcode::Lookup,
        Opcode::Lookup,
        Opcode::Getattr,
        Opcode::Setattr,
        Opcode::Readlink,
        Opcode::Symlink,
        Opcode::Mknod,
        Opcode::Mkdir,
        Opcode::Unlink,
        Opcode::Rmdir,
        Opcode::Rename,
        Opcode::Link,
        Opcode::Open,
        Opcode::Read,
        Opcode::Write,
        Opcode::Statfs,
        Opcode::Release,
        Opcode::Fsync,
        Opcode::Setxattr,
        Opcode::Getxattr,
        Opcode::Listxattr,
        Opcode::Removexattr,
        Opcode::Flush,
        Opcode::Opendir,
        Opcode::Readdir,
        Opcode::Releasedir,
        Opcode::Create,
        Opcode::Ioctl,
        Opcode::Poll,
        Opcode::Fallocate,
        Opcode::Readdirplus,
        Opcode::Rename2,
        Opcode::Lseek,
        Opcode::Getlk,
        Opcode::Setlk,
        Opcode::BatchForget,
        Opcode::Forget,
    ]);
    let natural = match opcode {
        Opcode::Mknod | Opcode::Create | Opcode::Rename2 => 16,
        Opcode::Mkdir
        | Opcode::Rename
        | Opcode::Link
        | Opcode::Open
        | Opcode::Opendir
        | Opcode::Setxattr
        | Opcode::Getxattr => 8,
        Opcode::Read | Opcode::Write | Opcode::Readdir | Opcode::Readdirplus => 40,
        Opcode::Setattr => 88,
        Opcode::Getattr => 16,
        Opcode::Fallocate => 32,
        Opcode::Release | Opcode::Releasedir | Opcode::Lseek => 24,
        _ => 0,
    };
    let fixed = if random.below(10) == 0 {
        random.pick(&FIXED)
    } else {
        natural
    };
    let mut body = Vec::new();
    while body.len() < fixed {
        let handle = random.pick(handles);
        let node = random.pick(nodes);
        let number = random.number();
        let value = random.pick(&[handle, handle, node, number, number & 0xfff, 0]);
        body.extend(value.to_le_bytes());
    }
    body.truncate(fixed);
    for _ in 0..random.below(3) {
        body.extend(c(random.pick(&NAMES)));
    }
    if random.below(8) == 0 {
        body.extend(vec![0x41; random.below(9000) as usize]);
    }
    let node = random.pick(nodes);
    let header = guest.header(opcode as u32, node, body.len());
    let room = random.pick(&[0, 15, 16, 100, 5000, ROOM, ROOM, ROOM]);
    let reply = guest.exchange(&[header.as_slice(), &body].concat(), room);
    let word = |at: usize| {
        reply
            .get(at..at + 8)
            .map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap()))
    };
    match opcode {
        Opcode::Open | Opcode::Opendir => (0, word(16)),
        Opcode::Create => (word(16), word(16 + size_of::<EntryOut>())),
        Opcode::Lookup | Opcode::Mkdir | Opcode::Mknod | Opcode::Symlink | Opcode::Link => {
            (word(16), 0)
        }
        _ => (0, 0),
    }
}

#[test]
fn random_requests_stay_within_the_share() {
    let seeds = std::env::var("SEEDS").map_or(20, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        let mut random = Random::new(seed);
        let mut guest = Guest::new();
        // What lies beside the shared directory must not change.
        let outside = TempDir::new().unwrap();
        let canary = outside.path().join("canary");
        fs::write(&canary, "alive").unwrap();
        symlink(&canary, guest.path("link")).unwrap();
        fs::create_dir(guest.path("dir")).unwrap();
        fs::write(guest.path("a"), vec![7; 10_000]).unwrap();
        let before = fs::metadata(&canary).unwrap();
        let (mut nodes, mut handles) = (vec![ROOT, ROOT, 2, u64::MAX], vec![1, 2]);
        let steps = std::panic::AssertUnwindSafe(|| {
            for _ in 0..600 {
                let (node, handle) = random_request(&mut guest, &nodes, &handles, &mut random);
                nodes.extend((node != 0).then_some(node));
                handles.extend((handle != 0).then_some(handle));
            }
            guest.init();
            fs::write(guest.path("fresh"), "").unwrap();
            guest.lookup(ROOT, "fresh").unwrap();
            guest.fs.reset();
            let after = fs::metadata(&canary).unwrap();
            assert_eq!(fs::read(&canary).unwrap(), b"alive");
            assert_eq!(
                (
                    before.mode(),
                    before.uid(),
                    before.mtime(),
                    before.ctime(),
                    before.nlink()
                ),
                (
                    after.mode(),
                    after.uid(),
                    after.mtime(),
                    after.ctime(),
                    after.nlink()
                )
            );
            assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
        });
        if std::panic::catch_unwind(steps).is_err() {
            panic!("seed {seed}");
        }
    }
}
