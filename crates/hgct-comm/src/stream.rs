//! A transport over any byte stream: a queue, one thread that writes, one that reads.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use hgct_core::dtype::MemoryKind;
use hgct_core::ids::Rank;

use crate::buffer::SendBuffer;
use crate::error::{Error, Result};
use crate::sync::{locked, wait_until};
use crate::time::{Deadline, monotonic_ns};
use crate::transport::{Capabilities, Loss, Outgoing, Region, Sink, SubmitError, Transport};
use crate::wire::{HEADER_BYTES, Header, MAX_MESSAGE_BYTES};

/// Messages up to this size leave on the caller's thread where the stream takes them at once: waking
/// the writer costs more than the copy.
const INLINE_BYTES: usize = 64 << 10;

/// How long a writer that found the connection ended leaves the report to the reader.
const READER_REPORTS: Duration = Duration::from_millis(200);

/// Stack of a transport's thread: its call depth is small, and a worker has two of them a peer.
const STACK_BYTES: usize = 256 << 10;

/// Both directions of a connection, as bytes. One thread writes and one reads at any time.
pub(crate) trait ByteStream: Send + Sync + 'static {
    /// Name of the transport over it.
    const NAME: &'static str;

    /// Writes what the stream takes without waiting, of `head` and then `body` from byte `skip` of
    /// the two together; returns how much.
    fn try_write(&self, head: &[u8], body: &[u8], skip: usize) -> io::Result<usize>;

    /// Writes `head` and then `body` from byte `skip` of the two together, waiting as it must.
    fn write_all(&self, head: &[u8], body: &[u8], skip: usize) -> io::Result<()>;

    /// Fills `buffer`; `Ok(false)` where the stream ended before its first byte.
    fn read_exact(&self, buffer: &mut [u8]) -> io::Result<bool>;

    /// Ends both directions; reads and writes under way return.
    fn shut_down(&self);
}

/// A transport over a byte stream.
pub(crate) struct StreamTransport<S: ByteStream> {
    shared: Arc<Shared<S>>,
    ended: Arc<(Mutex<u32>, Condvar)>,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

struct Shared<S> {
    stream: S,
    peer: Rank,
    sink: Arc<dyn Sink>,
    limit_bytes: u64,
    queue: Mutex<Queue>,
    /// The queue has a message or is closed.
    work: Condvar,
    /// The queue has become shorter or is closed.
    room: Condvar,
}

#[derive(Default)]
struct Queue {
    messages: VecDeque<Queued>,
    /// Bytes of the messages that are queued or being written.
    bytes: u64,
    /// Someone is writing; nobody else may.
    writing: bool,
    /// Takes no more messages.
    closed: bool,
    /// The reader has reported how the connection ended.
    reader_ended: bool,
    next_sequence: u64,
}

struct Queued {
    message: Outgoing,
    head: [u8; HEADER_BYTES],
    /// Bytes of header and payload that have left.
    written: usize,
    start_ns: u64,
}

impl<S: ByteStream> StreamTransport<S> {
    /// Starts the threads of a connection that is authenticated.
    pub(crate) fn start(stream: S, peer: Rank, sink: Arc<dyn Sink>, limit_bytes: u64) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            stream,
            peer,
            sink,
            limit_bytes,
            queue: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
        });
        let transport =
            Self { shared: Arc::clone(&shared), ended: Arc::default(), threads: Mutex::default() };
        transport.spawn("hgct-w", Shared::write_loop)?;
        transport.spawn("hgct-r", Shared::read_loop)?;
        Ok(transport)
    }

    fn spawn(&self, name: &str, body: fn(&Shared<S>)) -> io::Result<()> {
        let ended = Arc::clone(&self.ended);
        let shared = Arc::clone(&self.shared);
        let name = format!("{name}{}", shared.peer.0);
        let thread = thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || {
            // A panic here must not leave others waiting for a thread that is no more.
            if catch_unwind(AssertUnwindSafe(|| body(&shared))).is_err() {
                let loss = Loss::Ended(io::Error::other("a transport thread panicked"));
                shared.sink.lost(shared.peer, loss);
                shared.cancel();
                shared.stream.shut_down();
            }
            *locked(&ended.0) += 1;
            ended.1.notify_all();
        })?;
        locked(&self.threads).push(thread);
        Ok(())
    }
}

impl<S: ByteStream> Transport for StreamTransport<S> {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: S::NAME,
            memory_kinds: vec![MemoryKind::Host, MemoryKind::Pinned],
            max_message_bytes: MAX_MESSAGE_BYTES,
        }
    }

    fn register(&self, memory: SendBuffer, kind: MemoryKind) -> Result<Arc<Region>> {
        match kind {
            MemoryKind::Host | MemoryKind::Pinned => Ok(Region::new(memory, kind)),
            _ => Err(Error::Memory { transport: S::NAME, kind }),
        }
    }

    fn submit(&self, message: Outgoing, deadline: Deadline) -> Result<(), SubmitError> {
        self.shared.submit(message, deadline)
    }

    fn cancel(&self) {
        self.shared.cancel();
    }

    fn flush(&self, deadline: Deadline) -> bool {
        let mut queue = locked(&self.shared.queue);
        loop {
            if queue.closed {
                return false;
            }
            if queue.messages.is_empty() && !queue.writing {
                return true;
            }
            if deadline.has_passed() {
                return false;
            }
            queue = wait_until(&self.shared.room, queue, deadline);
        }
    }

    fn shut_down(&self) {
        self.shared.cancel();
        self.shared.stream.shut_down();
    }

    fn join(&self, deadline: Deadline) -> bool {
        let threads = std::mem::take(&mut *locked(&self.threads));
        let mut ended = locked(&self.ended.0);
        while (*ended as usize) < threads.len() && !deadline.has_passed() {
            ended = wait_until(&self.ended.1, ended, deadline);
        }
        let all = *ended as usize >= threads.len();
        drop(ended);
        if all {
            for thread in threads {
                // It ended already, and a panic was reported as a loss of the peer.
                let _ = thread.join();
            }
        }
        all
    }
}

impl<S: ByteStream> Shared<S> {
    fn submit(&self, mut message: Outgoing, deadline: Deadline) -> Result<(), SubmitError> {
        let bytes = message.payload.len() as u64;
        let mut queue = self.room_for(bytes, deadline)?;
        message.header.sequence = queue.next_sequence;
        queue.next_sequence += 1;
        queue.bytes += bytes;
        let head = message.header.encode();
        let mut queued = Queued { message, head, written: 0, start_ns: 0 };
        let idle = queue.messages.is_empty() && !queue.writing;
        if idle && queued.message.payload.len() <= INLINE_BYTES {
            queue.writing = true;
            drop(queue);
            queued.start_ns = monotonic_ns();
            let whole = HEADER_BYTES + queued.message.payload.len();
            let written = self.stream.try_write(&queued.head, queued.message.payload.as_bytes(), 0);
            // An error shows again when the writer tries, and is reported there.
            queued.written = written.unwrap_or(0);
            if queued.written == whole {
                self.finished(queued);
                return Ok(());
            }
            queue = locked(&self.queue);
            queue.writing = false;
            if queue.closed {
                drop(queue);
                self.sink.dropped(self.peer, queued.message);
                return Ok(());
            }
            // Nothing may overtake a message that has begun.
            queue.messages.push_front(queued);
        } else {
            queue.messages.push_back(queued);
        }
        drop(queue);
        self.work.notify_one();
        Ok(())
    }

    /// The queue, once it has room for `bytes`; a message above the limit may go alone.
    fn room_for(&self, bytes: u64, deadline: Deadline) -> Result<MutexGuard<'_, Queue>, SubmitError> {
        let fits = |queue: &Queue| {
            queue.closed || queue.bytes == 0 || bytes == 0 || queue.bytes + bytes <= self.limit_bytes
        };
        let mut queue = locked(&self.queue);
        while !fits(&queue) && !deadline.has_passed() {
            // The sink has a lock of its own, never taken under this one.
            drop(queue);
            self.sink.send_blocked(true);
            queue = locked(&self.queue);
            while !fits(&queue) && !deadline.has_passed() {
                queue = wait_until(&self.room, queue, deadline);
            }
            drop(queue);
            self.sink.send_blocked(false);
            queue = locked(&self.queue);
        }
        if queue.closed {
            Err(SubmitError::Closed)
        } else if fits(&queue) {
            Ok(queue)
        } else {
            Err(SubmitError::Full { queued_bytes: queue.bytes, limit_bytes: self.limit_bytes })
        }
    }

    /// Books a message that has left whole.
    fn finished(&self, queued: Queued) {
        let mut queue = locked(&self.queue);
        queue.writing = false;
        queue.bytes -= queued.message.payload.len() as u64;
        let more = !queue.messages.is_empty();
        drop(queue);
        self.room.notify_all();
        if more {
            self.work.notify_one();
        }
        self.sink.sent(self.peer, queued.message, queued.start_ns);
    }

    fn cancel(&self) {
        let mut queue = locked(&self.queue);
        queue.closed = true;
        let dropped = std::mem::take(&mut queue.messages);
        drop(queue);
        self.work.notify_all();
        self.room.notify_all();
        for queued in dropped {
            self.sink.dropped(self.peer, queued.message);
        }
    }

    fn write_loop(&self) {
        while let Some(mut queued) = self.next() {
            if queued.start_ns == 0 {
                queued.start_ns = monotonic_ns();
            }
            let body = queued.message.payload.as_bytes();
            // The length was promised in the header: a payload that shrank must not shift what
            // follows it.
            if body.len() as u64 != queued.message.header.bytes {
                self.give_up(queued, io::Error::other("a payload changed its length on the way"));
                return;
            }
            match self.stream.write_all(&queued.head, body, queued.written) {
                Ok(()) => self.finished(queued),
                Err(error) => {
                    self.give_up(queued, error);
                    return;
                }
            }
        }
    }

    /// The next message to write; `None` once closed.
    fn next(&self) -> Option<Queued> {
        let mut queue = locked(&self.queue);
        loop {
            if queue.closed {
                return None;
            }
            if !queue.writing
                && let Some(queued) = queue.messages.pop_front()
            {
                queue.writing = true;
                return Some(queued);
            }
            // Nothing is awaited here: the wait ends with a message or with the connection.
            queue = wait_until(&self.work, queue, Deadline::after(Duration::from_hours(1)));
        }
    }

    /// The reader sees what the peer sent before the connection ended, a goodbye perhaps: it is the one
    /// to report, unless it is busy.
    fn give_up(&self, queued: Queued, error: io::Error) {
        let patience = Deadline::after(READER_REPORTS);
        let mut queue = locked(&self.queue);
        while !queue.reader_ended && !patience.has_passed() {
            queue = wait_until(&self.room, queue, patience);
        }
        let reported = queue.reader_ended;
        queue.writing = false;
        drop(queue);
        if !reported {
            self.sink.lost(self.peer, Loss::Ended(error));
        }
        self.cancel();
        self.sink.dropped(self.peer, queued.message);
    }

    fn read_loop(&self) {
        let loss = self.read_until_loss();
        // The loss comes first, so that whoever finds the queue closed also finds the reason.
        self.sink.lost(self.peer, loss);
        locked(&self.queue).reader_ended = true;
        self.cancel();
        self.stream.shut_down();
    }

    fn read_until_loss(&self) -> Loss {
        let mut head = [0; HEADER_BYTES];
        for sequence in 0u64.. {
            match self.stream.read_exact(&mut head) {
                Ok(true) => {}
                Ok(false) => return Loss::Ended(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => return Loss::Ended(error),
            }
            let start_ns = monotonic_ns();
            let header = match Header::decode(&head) {
                Ok(header) if header.sequence == sequence => header,
                Ok(header) => {
                    return Loss::Protocol(format!(
                        "frame {} where frame {sequence} was due",
                        header.sequence
                    ));
                }
                Err(found) => return Loss::Protocol(found),
            };
            let mut payload = match self.sink.begin(self.peer, &header) {
                Ok(payload) => payload,
                Err(found) => return Loss::Protocol(found),
            };
            match self.stream.read_exact(&mut payload) {
                Ok(true) => self.sink.delivered(self.peer, &header, payload, start_ns),
                Ok(false) => return Loss::Ended(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => return Loss::Ended(error),
            }
        }
        Loss::Protocol("more frames than can be numbered".into())
    }
}
