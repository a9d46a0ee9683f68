//! The protocol between a command's client, the supervisor and the emulated host's init: length-prefixed
//! frames, each for one stream (one running command). It is spoken over the virtio-serial port and, with the
//! same bytes, over the unix socket that `testhost exec` connects to.
//!
//! A frame is `u32 length | u8 kind | u32 stream | body`, little-endian; `length` counts what follows it.

use std::io::{self, Read, Write};

/// The greatest `length` a reader accepts.
pub const MAX_FRAME: usize = 1 << 20;
/// The greatest piece of stdio put into one frame.
pub const CHUNK: usize = 32 * 1024;
/// How many bytes of one stdio stream may be under way without having been acknowledged.
pub const WINDOW: usize = 8 * CHUNK;
/// Said by the init in its first frame; a supervisor speaks with no other version.
pub const VERSION: u32 = 2;
/// The stream of frames that belong to no command.
pub const CONTROL: u32 = 0;

/// What can be wrong with a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Reading or writing failed, or the stream ended inside a frame.
    #[error("frame transport")]
    Io(#[from] io::Error),
    /// A length outside 5..=[`MAX_FRAME`].
    #[error("frame of {0} bytes is out of bounds")]
    Length(usize),
    /// A kind this version doesn't know.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// The body doesn't hold what its kind asks for.
    #[error("malformed body of frame kind {0}")]
    Body(u8),
}

/// One of a command's three stdio streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stdio {
    /// Standard input, towards the command.
    In = 0,
    /// Standard output, from the command.
    Out = 1,
    /// Standard error, from the command.
    Err = 2,
}

/// A share of the machine's file system that is mounted besides the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// The 9p mount tag.
    pub tag: Vec<u8>,
    /// Where it is mounted.
    pub path: Vec<u8>,
}

/// What the init must know before it can set the host up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Configure {
    /// The kernel's `lib/modules/VERSION` folder on the shared root.
    pub modules_dir: Vec<u8>,
    /// Writable shares.
    pub binds: Vec<Bind>,
    /// Files and folders copied from 9p to the tmpfs that overlays the root, at the same path.
    pub copies: Vec<Vec<u8>>,
    /// Mount the version 1 hierarchies of cgroups, not cgroup2.
    pub cgroup_v1: bool,
}

/// A command to run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Start {
    /// Program and arguments.
    pub argv: Vec<Vec<u8>>,
    /// `KEY=VALUE` entries added to the init's own small environment.
    pub env: Vec<Vec<u8>>,
    /// Working directory.
    pub cwd: Vec<u8>,
    /// Leave processes running that outlive the command.
    pub keep: bool,
    /// Drop the page and dentry caches first, so that files changed outside are seen.
    pub fresh: bool,
}

/// Everything that is said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Init's first frame: the protocol's version.
    Hello(u32),
    /// Supervisor's answer.
    Configure(Configure),
    /// The host is set up; milliseconds since the kernel started.
    Ready(u64),
    /// The host is alive; milliseconds since the kernel started.
    Heartbeat(u64),
    /// The init could not set the host up.
    SetupFailed(String),
    /// Run a command.
    Start(Start),
    /// The command runs.
    Started,
    /// The command could not be started: errno and a sentence.
    Rejected(i32, String),
    /// A piece of stdio; empty means end of file.
    Data(Stdio, Vec<u8>),
    /// So many bytes of that stream have been consumed.
    Ack(Stdio, u32),
    /// Send a signal to the command's process group.
    Signal(i32),
    /// Kill everything the command started.
    Kill,
    /// The same, and nobody listens any more.
    HangUp,
    /// The command ended: its exit code, 128+N for signal N. All output came before it.
    Exit(i32),
    /// Unmount the writable shares: the host is about to be switched off.
    Shutdown,
    /// Shutdown is done.
    Bye,
    /// Supervisor to client: the emulated host itself failed: reason, tail of its console.
    HostFailed(String, String),
    /// Supervisor to init, regularly: its only purpose is the interrupt that it causes.
    Ping,
    /// Client to supervisor: what state are you in? The answer carries a sentence.
    Status(String),
}

/// A message and the stream it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// [`CONTROL`], or a number chosen by the side that sent `Start`.
    pub stream: u32,
    /// What is said.
    pub message: Message,
}

impl Frame {
    /// A frame of one stream.
    pub fn new(stream: u32, message: Message) -> Self {
        Self { stream, message }
    }

    /// A frame that belongs to no command.
    pub fn control(message: Message) -> Self {
        Self::new(CONTROL, message)
    }

    /// The frame's bytes, length included.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; 4];
        out.push(self.message.kind());
        out.extend(self.stream.to_le_bytes());
        match &self.message {
            Message::Hello(version) => out.extend(version.to_le_bytes()),
            Message::Configure(c) => {
                put_bytes(&mut out, &c.modules_dir);
                put_count(&mut out, c.binds.len());
                for bind in &c.binds {
                    put_bytes(&mut out, &bind.tag);
                    put_bytes(&mut out, &bind.path);
                }
                put_list(&mut out, &c.copies);
                out.push(u8::from(c.cgroup_v1));
            }
            Message::Ready(ms) | Message::Heartbeat(ms) => out.extend(ms.to_le_bytes()),
            Message::SetupFailed(text) | Message::Status(text) => {
                put_bytes(&mut out, text.as_bytes());
            }
            Message::Start(s) => {
                put_list(&mut out, &s.argv);
                put_list(&mut out, &s.env);
                put_bytes(&mut out, &s.cwd);
                out.push(u8::from(s.keep));
                out.push(u8::from(s.fresh));
            }
            Message::Rejected(errno, text) => {
                out.extend(errno.to_le_bytes());
                put_bytes(&mut out, text.as_bytes());
            }
            Message::Data(stdio, data) => {
                out.push(*stdio as u8);
                out.extend(data);
            }
            Message::Ack(stdio, count) => {
                out.push(*stdio as u8);
                out.extend(count.to_le_bytes());
            }
            Message::Signal(number) | Message::Exit(number) => out.extend(number.to_le_bytes()),
            Message::HostFailed(reason, tail) => {
                put_bytes(&mut out, reason.as_bytes());
                put_bytes(&mut out, tail.as_bytes());
            }
            Message::Started
            | Message::Kill
            | Message::HangUp
            | Message::Ping
            | Message::Shutdown
            | Message::Bye => {}
        }
        let length = (out.len() - 4) as u32;
        out[..4].copy_from_slice(&length.to_le_bytes());
        out
    }

    /// Writes the frame with one call, so that frames of several threads don't mix.
    pub fn write_to(&self, mut to: impl Write) -> Result<(), FrameError> {
        let bytes = self.encode();
        if bytes.len() - 4 > MAX_FRAME {
            return Err(FrameError::Length(bytes.len() - 4));
        }
        to.write_all(&bytes)?;
        Ok(())
    }

    /// Reads one frame; `None` at an end of file between frames.
    pub fn read_from(mut from: impl Read) -> Result<Option<Self>, FrameError> {
        let mut length = [0; 4];
        let mut have = 0;
        while have < length.len() {
            match from.read(&mut length[have..]) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => have += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        let length = u32::from_le_bytes(length) as usize;
        if !(5..=MAX_FRAME).contains(&length) {
            return Err(FrameError::Length(length));
        }
        let mut bytes = vec![0; length];
        from.read_exact(&mut bytes)?;
        Self::decode(&bytes).map(Some)
    }

    /// Decodes what follows the length.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let (head, body) = bytes
            .split_at_checked(5)
            .ok_or(FrameError::Length(bytes.len()))?;
        let kind = head[0];
        let stream = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
        let mut body = Body { kind, rest: body };
        let message = match kind {
            1 => Message::Hello(body.u32()?),
            2 => {
                let modules_dir = body.bytes()?;
                let binds = (0..body.count()?)
                    .map(|_| {
                        Ok(Bind {
                            tag: body.bytes()?,
                            path: body.bytes()?,
                        })
                    })
                    .collect::<Result<_, FrameError>>()?;
                Message::Configure(Configure {
                    modules_dir,
                    binds,
                    copies: body.list()?,
                    cgroup_v1: body.flag()?,
                })
            }
            3 => Message::Ready(body.u64()?),
            4 => Message::Heartbeat(body.u64()?),
            5 => Message::SetupFailed(body.text()?),
            6 => Message::Start(Start {
                argv: body.list()?,
                env: body.list()?,
                cwd: body.bytes()?,
                keep: body.flag()?,
                fresh: body.flag()?,
            }),
            7 => Message::Started,
            8 => Message::Rejected(body.i32()?, body.text()?),
            9 => {
                let stdio = body.stdio()?;
                let data = std::mem::take(&mut body.rest).to_vec();
                Message::Data(stdio, data)
            }
            10 => Message::Ack(body.stdio()?, body.u32()?),
            11 => Message::Signal(body.i32()?),
            12 => Message::Kill,
            13 => Message::Exit(body.i32()?),
            14 => Message::Shutdown,
            15 => Message::Bye,
            16 => Message::HostFailed(body.text()?, body.text()?),
            17 => Message::Status(body.text()?),
            18 => Message::HangUp,
            19 => Message::Ping,
            _ => return Err(FrameError::Kind(kind)),
        };
        if !body.rest.is_empty() {
            return Err(FrameError::Body(kind));
        }
        Ok(Self { stream, message })
    }
}

impl Message {
    fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => 1,
            Self::Configure(_) => 2,
            Self::Ready(_) => 3,
            Self::Heartbeat(_) => 4,
            Self::SetupFailed(_) => 5,
            Self::Start(_) => 6,
            Self::Started => 7,
            Self::Rejected(..) => 8,
            Self::Data(..) => 9,
            Self::Ack(..) => 10,
            Self::Signal(_) => 11,
            Self::Kill => 12,
            Self::Exit(_) => 13,
            Self::Shutdown => 14,
            Self::Bye => 15,
            Self::HostFailed(..) => 16,
            Self::Status(_) => 17,
            Self::HangUp => 18,
            Self::Ping => 19,
        }
    }
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend((count as u32).to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_count(out, bytes.len());
    out.extend(bytes);
}

fn put_list(out: &mut Vec<u8>, list: &[Vec<u8>]) {
    put_count(out, list.len());
    for item in list {
        put_bytes(out, item);
    }
}

/// What is left of a body while it is taken apart.
struct Body<'a> {
    kind: u8,
    rest: &'a [u8],
}

impl<'a> Body<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], FrameError> {
        let (head, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or(FrameError::Body(self.kind))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let kind = self.kind;
        self.take(N)?.try_into().map_err(|_| FrameError::Body(kind))
    }

    fn u32(&mut self) -> Result<u32, FrameError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn i32(&mut self) -> Result<i32, FrameError> {
        Ok(i32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, FrameError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn flag(&mut self) -> Result<bool, FrameError> {
        match self.array::<1>()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(FrameError::Body(self.kind)),
        }
    }

    fn stdio(&mut self) -> Result<Stdio, FrameError> {
        match self.array::<1>()? {
            [0] => Ok(Stdio::In),
            [1] => Ok(Stdio::Out),
            [2] => Ok(Stdio::Err),
            _ => Err(FrameError::Body(self.kind)),
        }
    }

    /// A count of items, each of which takes at least the four bytes of its own length.
    fn count(&mut self) -> Result<usize, FrameError> {
        let count = self.u32()? as usize;
        if count > self.rest.len() / 4 {
            return Err(FrameError::Body(self.kind));
        }
        Ok(count)
    }

    fn bytes(&mut self) -> Result<Vec<u8>, FrameError> {
        let count = self.u32()? as usize;
        Ok(self.take(count)?.to_vec())
    }

    fn list(&mut self) -> Result<Vec<Vec<u8>>, FrameError> {
        (0..self.count()?).map(|_| self.bytes()).collect()
    }

    fn text(&mut self) -> Result<String, FrameError> {
        let kind = self.kind;
        String::from_utf8(self.bytes()?).map_err(|_| FrameError::Body(kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_message() -> Vec<Message> {
        vec![
            Message::Hello(VERSION),
            Message::Configure(Configure {
                modules_dir: b"/cache/lib/modules/6.1".to_vec(),
                binds: vec![Bind {
                    tag: b"bind0".to_vec(),
                    path: b"/out dir".to_vec(),
                }],
                copies: vec![b"/target/x".to_vec(), vec![]],
                cgroup_v1: true,
            }),
            Message::Ready(9_000),
            Message::Heartbeat(u64::MAX),
            Message::SetupFailed("mounting the root: no such device".into()),
            Message::Start(Start {
                argv: vec![b"sh".to_vec(), b"-c".to_vec(), b"\xff".to_vec()],
                env: vec![b"A=B".to_vec()],
                cwd: b"/".to_vec(),
                keep: false,
                fresh: true,
            }),
            Message::Started,
            Message::Rejected(2, "no such file".into()),
            Message::Data(Stdio::Out, b"\x00hello\n".to_vec()),
            Message::Data(Stdio::In, vec![]),
            Message::Ack(Stdio::Err, 77),
            Message::Signal(15),
            Message::Kill,
            Message::HangUp,
            Message::Ping,
            Message::Exit(-1),
            Message::Shutdown,
            Message::Bye,
            Message::HostFailed("panic".into(), "line\nline".into()),
            Message::Status(String::new()),
        ]
    }

    #[test]
    fn every_message_survives_the_round_trip() {
        let mut wire = vec![];
        for (n, message) in every_message().into_iter().enumerate() {
            Frame::new(n as u32, message).write_to(&mut wire).unwrap();
        }
        let mut wire = wire.as_slice();
        for (n, message) in every_message().into_iter().enumerate() {
            let frame = Frame::read_from(&mut wire).unwrap().unwrap();
            assert_eq!(frame, Frame::new(n as u32, message));
        }
        assert_eq!(Frame::read_from(&mut wire).unwrap(), None);
    }

    #[test]
    fn a_stream_that_ends_inside_a_frame_is_an_error() {
        for message in every_message() {
            let wire = Frame::control(message).encode();
            for cut in 1..wire.len() {
                assert!(Frame::read_from(&wire[..cut]).is_err());
            }
        }
    }

    #[test]
    fn truncated_bodies_and_trailing_bytes_are_refused() {
        for message in every_message() {
            let whole = Frame::control(message.clone()).encode();
            if !matches!(message, Message::Data(..)) {
                for cut in 5..whole.len() - 4 {
                    assert!(Frame::decode(&whole[4..4 + cut]).is_err(), "{message:?}");
                }
                let mut longer = whole[4..].to_vec();
                longer.push(0);
                assert!(Frame::decode(&longer).is_err(), "{message:?}");
            }
        }
    }

    #[test]
    fn lengths_and_counts_are_bounded_before_anything_is_allocated() {
        let mut wire = (MAX_FRAME as u32 + 1).to_le_bytes().to_vec();
        wire.extend([0; 16]);
        assert!(matches!(
            Frame::read_from(wire.as_slice()),
            Err(FrameError::Length(_))
        ));
        let mut start = vec![6, 0, 0, 0, 0];
        start.extend(u32::MAX.to_le_bytes());
        assert!(matches!(Frame::decode(&start), Err(FrameError::Body(6))));
        assert!(matches!(
            Frame::decode(&[99, 0, 0, 0, 0]),
            Err(FrameError::Kind(99))
        ));
    }
}
