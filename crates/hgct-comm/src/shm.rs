//! The byte stream between two processes of one host: rings, with the TCP connection as sign of life.

use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};

use crate::ring::{Ring, Rings, Side};
use crate::stream::ByteStream;

const OPEN: u8 = 0;
/// The peer is gone: what it wrote before may still be read.
const GONE: u8 = 1;
/// This side has shut down: nothing moves any more.
const SHUT: u8 = 2;

/// A pair of rings and the connection over which they were agreed.
#[derive(Clone)]
pub(crate) struct SharedMemory {
    inner: Arc<Inner>,
}

struct Inner {
    rings: Rings,
    /// The ring that this side writes: 0 for the dialer.
    outgoing: usize,
    /// Ends when the peer does.
    life: TcpStream,
    state: AtomicU8,
}

impl SharedMemory {
    pub(crate) fn new(rings: Rings, dialled: bool, life: TcpStream) -> io::Result<Self> {
        life.set_nonblocking(true)?;
        let outgoing = usize::from(!dialled);
        let inner = Inner { rings, outgoing, life, state: AtomicU8::new(OPEN) };
        Ok(Self { inner: Arc::new(inner) })
    }

    fn outgoing(&self) -> Ring<'_> {
        self.inner.rings.ring(self.inner.outgoing)
    }

    fn incoming(&self) -> Ring<'_> {
        self.inner.rings.ring(self.inner.outgoing + 1)
    }

    fn state(&self) -> u8 {
        self.inner.state.load(Ordering::SeqCst)
    }

    fn enter(&self, state: u8) {
        self.inner.state.fetch_max(state, Ordering::SeqCst);
        self.outgoing().wake_all();
        self.incoming().wake_all();
    }

    /// Looks at the connection; says whether it still lives.
    fn is_alive(&self) -> bool {
        // Nothing is sent over it once the rings are agreed: bytes are as wrong as an end.
        match (&self.inner.life).read(&mut [0; 1]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
            Ok(_) | Err(_) => false,
        }
    }
}

impl ByteStream for SharedMemory {
    const NAME: &'static str = "shared-memory";

    fn try_write(&self, head: &[u8], body: &[u8], skip: usize) -> io::Result<usize> {
        let mut written = skip;
        while written < head.len() + body.len() && self.state() == OPEN {
            match self.outgoing().write(rest(head, body, written))? {
                0 => break,
                count => written += count,
            }
        }
        Ok(written - skip)
    }

    fn write_all(&self, head: &[u8], body: &[u8], skip: usize) -> io::Result<()> {
        let whole = head.len() + body.len();
        let mut written = skip;
        while written < whole {
            if self.state() != OPEN {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let count = self.outgoing().write(rest(head, body, written))?;
            if count == 0 {
                let stop = || self.state() != OPEN;
                self.outgoing().sleep(Side::Writer, whole - written, stop)?;
            }
            written += count;
        }
        Ok(())
    }

    fn read_exact(&self, buffer: &mut [u8]) -> io::Result<bool> {
        let mut filled = 0;
        while filled < buffer.len() {
            // The state is looked at before the ring: what the peer wrote before it went is seen.
            let state = self.state();
            if state == SHUT {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let count = self.incoming().read(&mut buffer[filled..])?;
            if count == 0 {
                if state == GONE {
                    let clean = filled == 0;
                    return if clean { Ok(false) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
                }
                self.incoming().sleep(Side::Reader, 1, || self.state() != OPEN)?;
            }
            filled += count;
        }
        Ok(true)
    }

    fn shut_down(&self) {
        self.enter(SHUT);
        // The end of the connection tells the peer and ends the watch. It fails only where the
        // connection has ended already.
        let _ = self.inner.life.shutdown(Shutdown::Both);
    }
}

/// What is left of `head` and `body` from byte `skip` of the two together; `head` first.
fn rest<'a>(head: &'a [u8], body: &'a [u8], skip: usize) -> &'a [u8] {
    if skip < head.len() { &head[skip..] } else { &body[skip - head.len()..] }
}

/// Starts the one thread that watches the signs of life of all peers on this host. It ends when every
/// connection has.
pub(crate) fn watch(mut streams: Vec<SharedMemory>) -> io::Result<thread::JoinHandle<()>> {
    thread::Builder::new().name("hgct-watch".into()).stack_size(128 << 10).spawn(move || {
        while !streams.is_empty() {
            let mut polled: Vec<PollFd<'_>> = streams
                .iter()
                .map(|stream| {
                    PollFd::from_borrowed_fd(stream.inner.life.as_fd(), PollFlags::IN | PollFlags::RDHUP)
                })
                .collect();
            // An error other than an interruption cannot be waited out: the reads below find it.
            let _ = poll(&mut polled, None);
            streams.retain(|stream| {
                let alive = stream.is_alive();
                if !alive {
                    stream.enter(GONE);
                }
                alive
            });
        }
    })
}
