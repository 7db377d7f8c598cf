//! Control connections: accepted, authenticated, read and written by threads of their own.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use hgct_control::auth::{Handshake, Token};
use hgct_control::coordinator::{ConnectionId, Event, LostCause};
use hgct_control::frame::{Decoder, encode_header};
use hgct_control::message::{Envelope, FromAgent, ToAgent};
use hgct_core::ids::{NodeId, RunId};

/// A stranger that has not proved itself by then is closed.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Strangers at once; more are closed unheard.
const MAX_STRANGERS: usize = 64;

/// Frames on their way to one agent.
struct Link {
    frames: Sender<(Vec<u8>, Vec<u8>)>,
    stream: TcpStream,
}

/// All connections, by number.
pub(super) struct Connections {
    events: SyncSender<Event>,
    queued: Arc<AtomicU64>,
    /// Authenticated ones that the machine has not heard of.
    arrived: Arc<Mutex<BTreeMap<ConnectionId, Link>>>,
    links: BTreeMap<ConnectionId, Link>,
}

impl Connections {
    pub(super) fn new(events: SyncSender<Event>, queued: Arc<AtomicU64>) -> Self {
        Self { events, queued, arrived: Arc::default(), links: BTreeMap::new() }
    }

    /// Takes connections from now on.
    pub(super) fn listen(&self, listener: TcpListener, run: RunId, token: Token) -> Result<()> {
        let (events, queued, arrived) =
            (self.events.clone(), Arc::clone(&self.queued), Arc::clone(&self.arrived));
        let accept = move || {
            let strangers = Arc::new(AtomicUsize::new(0));
            for (number, stream) in (0..).zip(listener.incoming()) {
                let Ok(stream) = stream else { continue };
                if strangers.fetch_add(1, Ordering::AcqRel) >= MAX_STRANGERS {
                    strangers.fetch_sub(1, Ordering::AcqRel);
                    continue;
                }
                let (events, queued, arrived) = (events.clone(), Arc::clone(&queued), Arc::clone(&arrived));
                let (run, token, strangers) = (run.clone(), token.clone(), Arc::clone(&strangers));
                let serve = move || {
                    let proved = authenticate(&stream, &run, token);
                    strangers.fetch_sub(1, Ordering::AcqRel);
                    match proved {
                        Ok(node) => serve(ConnectionId(number), node, &stream, &events, &queued, &arrived),
                        Err(error) => eprintln!("hgct: a connection was refused: {error:#}"),
                    }
                };
                // Without a thread the stranger is dropped, which closes its connection.
                let _ = std::thread::Builder::new().name("hgct-agent-link".into()).spawn(serve);
            }
        };
        std::thread::Builder::new()
            .name("hgct-listener".into())
            .spawn(accept)
            .map(drop)
            .context("cannot start a thread")
    }

    /// Makes a new connection known before the machine hears of it.
    pub(super) fn before(&mut self, event: &Event) {
        if let Event::AgentJoined { connection, .. } = event {
            let link = self.arrived.lock().unwrap_or_else(PoisonError::into_inner).remove(connection);
            self.links.extend(link.map(|link| (*connection, link)));
        }
    }

    /// Queues a frame.
    pub(super) fn send(&mut self, connection: ConnectionId, envelope: &Envelope<ToAgent>, payload: Vec<u8>) {
        let Some(link) = self.links.get(&connection) else { return };
        match encode_header(envelope, payload.len()) {
            Ok(header) => {
                let bytes = (header.len() + payload.len()) as u64;
                self.queued.fetch_add(bytes, Ordering::Relaxed);
                // A writer that has ended tells by its reader.
                if link.frames.send((header, payload)).is_err() {
                    self.queued.fetch_sub(bytes, Ordering::Relaxed);
                }
            }
            Err(error) => eprintln!("hgct: a message cannot be sent: {error}"),
        }
    }

    /// Lets the writer finish, then closes.
    pub(super) fn close(&mut self, connection: ConnectionId, _reason: &str) {
        // Dropping the sender ends the writer once its queue is empty; it then closes the stream.
        if let Some(link) = self.links.remove(&connection) {
            let _ = link.stream.set_write_timeout(Some(Duration::from_secs(1)));
        }
    }
}

/// The server's side of the handshake, at most [`HANDSHAKE`] in all.
fn authenticate(stream: &TcpStream, run: &RunId, token: Token) -> Result<NodeId> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(|error| anyhow!("no randomness: {error}"))?;
    let deadline = std::time::Instant::now() + HANDSHAKE;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(HANDSHAKE))?;
    let mut handshake = Handshake::server(token, run, nonce);
    let mut stream = stream;
    loop {
        stream.write_all(&handshake.output())?;
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return Err(anyhow!("it did not prove itself within {} s", HANDSHAKE.as_secs()));
        }
        stream.set_read_timeout(Some(left))?;
        let mut bytes = vec![0; handshake.wanted()];
        let read = stream.read(&mut bytes).context("it did not finish the handshake")?;
        if read == 0 {
            return Err(anyhow!("it went away inside of the handshake"));
        }
        match handshake.receive(&bytes[..read]) {
            Ok(None) => {}
            Ok(Some(peer)) => {
                stream.write_all(&handshake.output())?;
                stream.set_read_timeout(None)?;
                stream.set_write_timeout(None)?;
                return Ok(peer.node);
            }
            Err(error) => {
                // The refusal in words; whether it arrives matters little.
                let _ = stream.write_all(&handshake.output());
                return Err(error.into());
            }
        }
    }
}

/// An authenticated connection until it ends; runs on its own thread and reads.
fn serve(
    connection: ConnectionId,
    node: NodeId,
    stream: &TcpStream,
    events: &SyncSender<Event>,
    queued: &Arc<AtomicU64>,
    arrived: &Mutex<BTreeMap<ConnectionId, Link>>,
) {
    let (frames, outgoing) = channel();
    let joined = stream.try_clone().and_then(|writer| {
        let (queued, write) = (Arc::clone(queued), stream.try_clone()?);
        std::thread::Builder::new()
            .name("hgct-agent-write".into())
            .spawn(move || write_frames(writer, &outgoing, &queued))?;
        arrived
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(connection, Link { frames, stream: write });
        Ok(())
    });
    let cause = match joined {
        Ok(()) => {
            if events.send(Event::AgentJoined { connection, node }).is_err() {
                return;
            }
            match read_frames(connection, stream, events) {
                Some(cause) => cause,
                None => return,
            }
        }
        Err(error) => LostCause::Connection { message: error.to_string() },
    };
    // Nobody listens any more once the run has ended.
    let _ = events.send(Event::AgentLost { connection, cause });
}

/// Reads until the connection ends; `None` once nobody listens.
fn read_frames(
    connection: ConnectionId,
    mut stream: &TcpStream,
    events: &SyncSender<Event>,
) -> Option<LostCause> {
    let mut decoder = Decoder::<FromAgent>::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match decoder.next_frame() {
            Ok(Some((envelope, payload))) => {
                events
                    .send(Event::AgentMessage { connection, envelope: Box::new(envelope), payload })
                    .ok()?;
            }
            Ok(None) => match stream.read(&mut buffer) {
                Ok(0) => return Some(LostCause::Closed),
                Ok(read) => decoder.push(&buffer[..read]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Some(LostCause::Connection { message: error.to_string() }),
            },
            Err(error) => return Some(LostCause::Protocol { message: error.to_string() }),
        }
    }
}

fn write_frames(mut stream: TcpStream, frames: &Receiver<(Vec<u8>, Vec<u8>)>, queued: &AtomicU64) {
    let mut broken = false;
    for (header, payload) in frames {
        if !broken {
            broken = stream.write_all(&header).and_then(|()| stream.write_all(&payload)).is_err();
        }
        queued.fetch_sub((header.len() + payload.len()) as u64, Ordering::Relaxed);
    }
    let _ = stream.shutdown(Shutdown::Both);
}
