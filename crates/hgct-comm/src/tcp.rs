//! The byte stream that reaches every host.

use std::io::{self, IoSlice, Read};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use socket2::{SockRef, TcpKeepalive};

use crate::stream::ByteStream;

/// An idle connection is asked for a sign of life after this time, three times at most.
const KEEPALIVE: Duration = Duration::from_secs(2);

/// One TCP connection.
pub(crate) struct Tcp {
    stream: TcpStream,
}

impl Tcp {
    /// Prepares a connected socket: blocking, without delay, with signs of life.
    pub(crate) fn new(stream: TcpStream, buffer_bytes: Option<usize>) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        let socket = SockRef::from(&stream);
        let keepalive =
            TcpKeepalive::new().with_time(KEEPALIVE).with_interval(Duration::from_secs(1)).with_retries(3);
        socket.set_tcp_keepalive(&keepalive)?;
        // Without a size the system adapts the buffers, up to more than it lets a program ask for.
        if let Some(bytes) = buffer_bytes {
            socket.set_send_buffer_size(bytes)?;
            socket.set_recv_buffer_size(bytes)?;
        }
        Ok(Self { stream })
    }

    /// One vectored write. `NOSIGNAL`: a dead peer is an error, never a SIGPIPE.
    fn write_some(&self, head: &[u8], body: &[u8], skip: usize, flags: SendFlags) -> io::Result<usize> {
        let head_left = head.get(skip..).unwrap_or_default();
        let body_left = &body[skip.saturating_sub(head.len())..];
        let parts = [IoSlice::new(head_left), IoSlice::new(body_left)];
        let parts = if head_left.is_empty() { &parts[1..] } else { &parts[..] };
        let sent =
            sendmsg(&self.stream, parts, &mut SendAncillaryBuffer::default(), flags | SendFlags::NOSIGNAL)?;
        Ok(sent)
    }
}

impl ByteStream for Tcp {
    const NAME: &'static str = "tcp";

    fn try_write(&self, head: &[u8], body: &[u8], skip: usize) -> io::Result<usize> {
        match self.write_some(head, body, skip, SendFlags::DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            other => other,
        }
    }

    fn write_all(&self, head: &[u8], body: &[u8], mut skip: usize) -> io::Result<()> {
        while skip < head.len() + body.len() {
            match self.write_some(head, body, skip, SendFlags::empty()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => skip += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read_exact(&self, buffer: &mut [u8]) -> io::Result<bool> {
        let mut filled = 0;
        while filled < buffer.len() {
            match (&self.stream).read(&mut buffer[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn shut_down(&self) {
        // It fails only where the connection has ended already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
