//! Connections: vsock in a guest, unix sockets in tests on a development machine.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

/// A connection to the host.
#[derive(Debug)]
pub enum Connection {
    /// In a guest.
    Vsock(VsockStream),
    /// In tests.
    Unix(UnixStream),
}

impl Connection {
    /// Dials a port of the host.
    pub async fn dial_host(port: u32) -> io::Result<Self> {
        VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port))
            .await
            .map(Self::Vsock)
    }
}

/// Accepts the connections of streams.
#[derive(Debug)]
pub enum Listener {
    /// In a guest.
    Vsock(VsockListener),
    /// In tests.
    Unix(UnixListener),
}

impl Listener {
    /// Listens on a vsock port.
    pub fn bind_vsock(port: u32) -> io::Result<Self> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map(Self::Vsock)
    }

    /// The next connection of the host. What a process of the guest opens is closed at once.
    pub async fn accept(&self) -> io::Result<Connection> {
        loop {
            match self {
                Self::Vsock(listener) => {
                    let (stream, peer) = listener.accept().await?;
                    if peer.cid() == VMADDR_CID_HOST {
                        return Ok(Connection::Vsock(stream));
                    }
                    tracing::warn!(
                        cid = peer.cid(),
                        "refused a stream connection that is not the host's"
                    );
                }
                Self::Unix(listener) => {
                    return listener
                        .accept()
                        .await
                        .map(|(stream, _)| Connection::Unix(stream));
                }
            }
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_flush(context),
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// The control connection: tells of its end, which ttrpc's server keeps to itself.
#[derive(Debug)]
pub struct Control {
    connection: Connection,
    ended: Arc<Notify>,
}

impl Control {
    /// Wraps the connection; `ended` is notified once when the host closes it, or it breaks.
    pub fn new(connection: Connection, ended: Arc<Notify>) -> Self {
        Self { connection, ended }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.ended.notify_one();
    }
}

impl AsyncRead for Control {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.connection).poll_read(context, buffer);
        let ended = match &result {
            Poll::Ready(Ok(())) => buffer.filled().len() == before && buffer.remaining() > 0,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if ended {
            self.ended.notify_one();
        }
        result
    }
}

impl AsyncWrite for Control {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(context)
    }
}
