//! Making the full mesh: one loop over listeners, dials and handshakes, without threads.
//!
//! Of two ranks the higher dials the lower; where the lower has no endpoint it is the other way
//! round. A connection from any member is taken, whoever was to dial. Strangers cost a slot for at
//! most [`STRANGER_NS`], and the oldest stranger makes room for a new one, so they can neither block
//! nor exhaust the loop.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use hgct_core::ids::{Generation, Rank, RunId};
use rustix::event::{PollFd, PollFlags, poll};
use socket2::{Domain, Protocol, Socket, Type};

use crate::endpoint::{Listener, Peer};
use crate::error::{Context, Error, Operation, Refusal, Result};
use crate::handshake::{Failure, Handshake, Identity, Offer, Progress};
use crate::key::{RunKey, run_digest};
use crate::ring::{Offered, Rings};
use crate::time::{Deadline, monotonic_ns, timespec};

/// A connection that does not prove itself within this time is closed.
const STRANGER_NS: u64 = 2_000_000_000;
/// A dial that does not connect within this time moves on to the next endpoint.
const DIAL_NS: u64 = 3_000_000_000;
/// Pause after a failed dial: the peer may not listen yet. Doubles up to the second figure.
const RETRY_NS: (u64, u64) = (10_000_000, 500_000_000);
/// Connections that may be in their handshake at once.
const MAX_STRANGERS: usize = 128;
/// Refusals kept for the error message.
const MAX_REFUSED: usize = 4;

/// What a connect needs to know.
#[derive(Debug)]
pub struct ConnectOptions<'a> {
    /// All members, this rank too. Every member has the same list.
    pub group: Vec<Peer>,
    /// This rank.
    pub me: Rank,
    /// The generation of the communicator.
    pub generation: Generation,
    /// The run.
    pub run: RunId,
    /// Its key.
    pub key: RunKey,
    /// Where connections come in.
    pub listener: &'a Listener,
    /// When to give up.
    pub deadline: Deadline,
    /// Use shared memory with ranks of the same host, where it can be had.
    pub shared_memory: bool,
    /// For tests: each message becomes visible this much later, without holding up others.
    pub test_delay_ns: u64,
    /// What may be left at its default.
    pub tuning: Tuning,
}

/// Limits and sizes that rarely need another value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Bytes that may be queued to a peer.
    pub queue_bytes: u64,
    /// Unread bytes from a peer above which it is held back while this rank waits for nothing.
    pub unread_bytes: u64,
    /// Idle receive buffers that are kept.
    pub pool_bytes: usize,
    /// Bytes of a shared-memory ring, a power of two; each pair of ranks has two.
    pub ring_bytes: usize,
    /// Size of the socket buffers; without it the system adapts them.
    pub socket_buffer_bytes: Option<usize>,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            queue_bytes: 256 << 20,
            unread_bytes: 256 << 20,
            pool_bytes: 32 << 20,
            // A worker's memory is counted: two rings a peer. Smaller ones cost more CPU time a byte,
            // larger ones did not measurably save any (`link_bench`, two busy cores).
            ring_bytes: 2 << 20,
            socket_buffer_bytes: None,
        }
    }
}

/// A connection that has passed the handshake.
pub(crate) struct Connected {
    pub(crate) stream: TcpStream,
    /// Shared memory that both sides have opened.
    pub(crate) rings: Option<Rings>,
    /// This side made the connection.
    pub(crate) dialled: bool,
}

/// Connects with every other member.
pub(crate) fn connect(options: &ConnectOptions<'_>) -> Result<BTreeMap<Rank, Connected>> {
    check_group(options)?;
    let mut mesh = Mesh::new(options);
    while !mesh.missing().is_empty() {
        if options.deadline.has_passed() {
            return Err(mesh.incomplete());
        }
        mesh.dial_due();
        mesh.wait()?;
        mesh.take_new();
        mesh.advance()?;
    }
    Ok(mesh.connected)
}

fn check_group(options: &ConnectOptions<'_>) -> Result<()> {
    let mut ranks: Vec<Rank> = options.group.iter().map(|peer| peer.rank).collect();
    ranks.sort_unstable();
    if ranks.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Error::Options {
            found: "a rank stands twice in the group".into(),
            allowed: "each rank is one member",
        });
    }
    if !ranks.contains(&options.me) {
        return Err(Error::Options {
            found: format!("{} is not in the group", options.me),
            allowed: "this rank is a member too",
        });
    }
    if !options.tuning.ring_bytes.is_power_of_two() || options.tuning.ring_bytes < 4096 {
        return Err(Error::Options {
            found: format!("a ring of {} bytes", options.tuning.ring_bytes),
            allowed: "it is a power of two of at least 4096",
        });
    }
    Ok(())
}

struct Mesh<'a, 'b> {
    options: &'a ConnectOptions<'b>,
    identity: Identity,
    connected: BTreeMap<Rank, Connected>,
    dials: BTreeMap<Rank, Dial>,
    attempts: Vec<Attempt>,
    sharing: Arc<Sharing>,
    refused: Vec<String>,
}

/// What this rank does about a peer that it dials.
struct Dial {
    endpoints: Vec<SocketAddr>,
    next: usize,
    due_ns: u64,
    pause_ns: u64,
    /// An attempt is under way.
    busy: bool,
}

/// A connection on its way.
struct Attempt {
    stream: TcpStream,
    address: SocketAddr,
    /// Whom it was dialled to; `None` for one that came in.
    dialled: Option<Rank>,
    /// The TCP connection itself is not there yet.
    connecting: bool,
    handshake: Handshake,
    sharing: Arc<Sharing>,
    /// The dialer's offer, until it is answered.
    offered: Option<Offered>,
    /// The acceptor's half of an offer that it took.
    rings: Option<Rings>,
    /// The acceptor has sent its answer and is done once that has left.
    finished: Option<Rank>,
    give_up_ns: u64,
    /// How long to wait for the peer once the TCP connection is there.
    patience_ns: u64,
}

/// With whom shared memory is used.
struct Sharing {
    ranks: BTreeSet<Rank>,
    ring_bytes: usize,
}

/// How an attempt stands after it was looked at.
enum Outcome {
    Pending,
    Done(Rank),
    Failed(Failure),
    Lost(io::Error),
}

impl<'a, 'b> Mesh<'a, 'b> {
    fn new(options: &'a ConnectOptions<'b>) -> Self {
        let group = &options.group;
        let identity = Identity {
            me: options.me,
            members: group.iter().map(|peer| peer.rank).collect(),
            generation: options.generation,
            run: run_digest(&options.run),
            key: options.key.clone(),
        };
        let reachable = |rank: Rank| group.iter().any(|peer| peer.rank == rank && !peer.endpoints.is_empty());
        let dials = group.iter().filter(|peer| {
            let to_lower = peer.rank < options.me && reachable(peer.rank);
            let to_higher = peer.rank > options.me && !reachable(options.me) && reachable(peer.rank);
            to_lower || to_higher
        });
        let dials = dials.map(|peer| {
            let endpoints = peer.endpoints.iter().map(|endpoint| endpoint.address).collect();
            let dial = Dial { endpoints, next: 0, due_ns: 0, pause_ns: RETRY_NS.0, busy: false };
            (peer.rank, dial)
        });
        Self {
            options,
            identity,
            connected: BTreeMap::new(),
            dials: dials.collect(),
            attempts: Vec::new(),
            sharing: Arc::new(Sharing::of(options)),
            refused: Vec::new(),
        }
    }

    fn missing(&self) -> Vec<Rank> {
        let others = self.identity.members.iter().filter(|&&rank| rank != self.options.me);
        others.filter(|rank| !self.connected.contains_key(rank)).copied().collect()
    }

    fn context(&self, peer: Option<Rank>) -> Context {
        Context {
            rank: self.options.me,
            peer,
            operation: Operation::Connect,
            tag: None,
            generation: self.options.generation,
            sequence: None,
            bytes: None,
        }
    }

    fn incomplete(&self) -> Error {
        Error::Incomplete {
            context: Box::new(self.context(None)),
            missing: self.missing(),
            refused: self.refused.clone(),
        }
    }

    fn system(&self, action: &'static str, source: io::Error) -> Error {
        Error::System { context: Box::new(self.context(None)), action, source: Arc::new(source) }
    }

    /// Starts the dials whose time has come.
    fn dial_due(&mut self) {
        let now_ns = monotonic_ns();
        let mut fresh = Vec::new();
        for (&rank, dial) in &mut self.dials {
            if dial.busy || self.connected.contains_key(&rank) || now_ns < dial.due_ns {
                continue;
            }
            let address = dial.endpoints[dial.next % dial.endpoints.len()];
            dial.next += 1;
            match start_dial(address) {
                Ok(stream) => {
                    dial.busy = true;
                    // The peer answers once it connects too, which may be as late as the deadline;
                    // another endpoint is tried sooner.
                    let patience_ns = if dial.endpoints.len() > 1 { DIAL_NS } else { u64::MAX };
                    fresh.push((rank, address, stream, patience_ns));
                }
                Err(error) => {
                    dial.postpone(now_ns);
                    note(&mut self.refused, address, &error.to_string());
                }
            }
        }
        for (rank, address, stream, patience_ns) in fresh {
            // The system's random source has no state in which it fails once it has worked.
            let Ok(nonce) = nonce() else { continue };
            self.attempts.push(Attempt {
                stream,
                address,
                dialled: Some(rank),
                connecting: true,
                handshake: Handshake::dial(self.identity.clone(), rank, nonce),
                sharing: Arc::clone(&self.sharing),
                offered: None,
                rings: None,
                finished: None,
                give_up_ns: now_ns + DIAL_NS,
                patience_ns,
            });
        }
    }

    /// Waits until something can move, a dial is due or an attempt has run out.
    fn wait(&mut self) -> Result<()> {
        let now_ns = monotonic_ns();
        let mut until_ns = self.options.deadline.ns();
        for (rank, dial) in &self.dials {
            if !dial.busy && !self.connected.contains_key(rank) {
                until_ns = until_ns.min(dial.due_ns);
            }
        }
        let mut sockets: Vec<(BorrowedFd<'_>, PollFlags)> = Vec::new();
        for socket in &self.options.listener.sockets {
            sockets.push((socket.as_fd(), PollFlags::IN));
        }
        for attempt in &mut self.attempts {
            until_ns = until_ns.min(attempt.give_up_ns);
            let writes = attempt.connecting || !attempt.handshake.output().is_empty();
            let flags = if writes { PollFlags::OUT } else { PollFlags::IN };
            sockets.push((attempt.stream.as_fd(), flags));
        }
        let mut polled: Vec<PollFd<'_>> =
            sockets.iter().map(|(socket, flags)| PollFd::from_borrowed_fd(*socket, *flags)).collect();
        let timeout = timespec(Duration::from_nanos(until_ns.saturating_sub(now_ns)));
        match poll(&mut polled, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(self.system("wait for connections", error.into())),
        }
    }

    /// Takes what has come in.
    fn take_new(&mut self) {
        for socket in &self.options.listener.sockets {
            // A listener that fails (too many open files, a connection gone already) is asked again
            // at the next turn; the deadline ends it.
            while let Ok((stream, address)) = socket.accept() {
                let (Ok(()), Ok(nonce)) = (stream.set_nonblocking(true), nonce()) else { continue };
                let strangers = self.attempts.iter().filter(|attempt| attempt.dialled.is_none());
                if strangers.count() >= MAX_STRANGERS
                    && let Some(oldest) = self.attempts.iter().position(|attempt| attempt.dialled.is_none())
                {
                    let evicted = self.attempts.remove(oldest);
                    note(&mut self.refused, evicted.address, "silent while others waited");
                }
                self.attempts.push(Attempt {
                    stream,
                    address,
                    dialled: None,
                    connecting: false,
                    handshake: Handshake::accept(self.identity.clone(), nonce),
                    sharing: Arc::clone(&self.sharing),
                    offered: None,
                    rings: None,
                    finished: None,
                    give_up_ns: monotonic_ns() + STRANGER_NS,
                    patience_ns: 0,
                });
            }
        }
    }

    /// Moves every attempt as far as it goes.
    fn advance(&mut self) -> Result<()> {
        let attempts = std::mem::take(&mut self.attempts);
        for mut attempt in attempts {
            let outcome = attempt.advance();
            let now_ns = monotonic_ns();
            match outcome {
                Outcome::Pending if now_ns < attempt.give_up_ns => self.attempts.push(attempt),
                Outcome::Pending => {
                    note(&mut self.refused, attempt.address, "it said nothing in time");
                    self.retry(attempt.dialled, now_ns);
                }
                Outcome::Done(rank) => {
                    // A second connection means that the peer gave the first one up.
                    let connected = Connected {
                        stream: attempt.stream,
                        rings: attempt.rings,
                        dialled: attempt.dialled.is_some(),
                    };
                    self.connected.insert(rank, connected);
                }
                Outcome::Lost(error) => {
                    note(&mut self.refused, attempt.address, &error.to_string());
                    self.retry(attempt.dialled, now_ns);
                }
                Outcome::Failed(failure) => self.failed(&attempt, &failure, now_ns)?,
            }
        }
        Ok(())
    }

    /// A stranger is only noted. A peer that we dialled and that answers "no" ends the connect, where
    /// another try could not end differently.
    fn failed(&mut self, attempt: &Attempt, failure: &Failure, now_ns: u64) -> Result<()> {
        let address = attempt.address;
        note(&mut self.refused, address, &failure.text());
        let Some(rank) = attempt.dialled else { return Ok(()) };
        let context = Box::new(self.context(Some(rank)));
        match failure {
            Failure::Key | Failure::Refused(Refusal::Key) => Err(Error::WrongKey { context, address }),
            Failure::Version(theirs) => {
                let refusal = Refusal::Version { theirs: *theirs };
                Err(Error::Refused { context, address, refusal })
            }
            // It may be about to move on to our generation.
            Failure::Refused(Refusal::Generation { theirs }) if *theirs < self.options.generation => {
                self.retry(Some(rank), now_ns);
                Ok(())
            }
            Failure::Refused(refusal) | Failure::Unfit(refusal) => {
                Err(Error::Refused { context, address, refusal: *refusal })
            }
            Failure::Malformed(_) => {
                self.retry(Some(rank), now_ns);
                Ok(())
            }
        }
    }

    fn retry(&mut self, dialled: Option<Rank>, now_ns: u64) {
        if let Some(dial) = dialled.and_then(|rank| self.dials.get_mut(&rank)) {
            dial.busy = false;
            dial.postpone(now_ns);
        }
    }
}

impl Sharing {
    fn of(options: &ConnectOptions<'_>) -> Self {
        let host = |rank: Rank| {
            options.group.iter().find(|peer| peer.rank == rank).map(|peer| peer.host_id.as_str())
        };
        let mine = host(options.me);
        let others = options
            .group
            .iter()
            .map(|peer| peer.rank)
            .filter(|&rank| options.shared_memory && rank != options.me && host(rank) == mine);
        Self { ranks: others.collect(), ring_bytes: options.tuning.ring_bytes }
    }

    /// Rings for a peer; `None` where it is elsewhere or the system has none to give.
    fn offer(&self, rank: Rank) -> Option<Offered> {
        let cookie = self.ranks.contains(&rank).then(nonce)?.ok()?;
        Rings::offer(self.ring_bytes, cookie).ok()
    }
}

impl Dial {
    fn postpone(&mut self, now_ns: u64) {
        self.due_ns = now_ns + self.pause_ns;
        if self.next.is_multiple_of(self.endpoints.len()) {
            self.pause_ns = (self.pause_ns * 2).min(RETRY_NS.1);
        }
    }
}

impl Attempt {
    fn advance(&mut self) -> Outcome {
        match self.try_advance() {
            Ok(outcome) => outcome,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Outcome::Pending,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Outcome::Pending,
            Err(error) => Outcome::Lost(error),
        }
    }

    fn try_advance(&mut self) -> io::Result<Outcome> {
        if self.connecting {
            if !is_writable(&self.stream)? {
                return Ok(Outcome::Pending);
            }
            if let Some(error) = self.stream.take_error()? {
                return Err(error);
            }
            self.connecting = false;
            self.give_up_ns = monotonic_ns().saturating_add(self.patience_ns);
        }
        loop {
            self.write_output()?;
            if let Some(rank) = self.finished {
                return Ok(Outcome::Done(rank));
            }
            let mut buffer = [0; 256];
            let wanted = self.handshake.wanted().min(buffer.len());
            let read = self.stream.read(&mut buffer[..wanted])?;
            if read == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "it closed the connection in the handshake",
                ));
            }
            match self.handshake.receive(&buffer[..read]) {
                Ok(Progress::Wait) => {}
                Ok(Progress::MayOffer(rank)) => {
                    self.offered = self.sharing.offer(rank);
                    let offer = self.offered.as_ref().map_or(Offer::NONE, |offered| offered.offer);
                    self.handshake.offer(offer);
                }
                Ok(Progress::Offered(rank, offer)) => {
                    // Where it cannot be opened, the connection itself serves.
                    let welcome = self.sharing.ranks.contains(&rank);
                    self.rings = if welcome { Rings::take(&offer).ok() } else { None };
                    self.handshake.answer(self.rings.is_some());
                    self.finished = Some(rank);
                }
                Ok(Progress::Done(rank, taken)) => {
                    let offered = self.offered.take();
                    self.rings = if taken { offered.map(|offered| offered.rings) } else { None };
                    return Ok(Outcome::Done(rank));
                }
                Err(failure) => {
                    // The refusal fits the empty socket buffer; if not, the close says enough.
                    let _ = self.write_output();
                    return Ok(Outcome::Failed(failure));
                }
            }
        }
    }

    fn write_output(&mut self) -> io::Result<()> {
        while !self.handshake.output().is_empty() {
            let written = self.stream.write(self.handshake.output())?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.handshake.output().drain(..written);
        }
        Ok(())
    }
}

fn start_dial(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
        Err(error) => return Err(error),
    }
    Ok(socket.into())
}

fn is_writable(stream: &TcpStream) -> io::Result<bool> {
    let mut polled = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::OUT)];
    Ok(poll(&mut polled, Some(&timespec(Duration::ZERO)))? > 0)
}

pub(crate) fn nonce() -> io::Result<[u8; 32]> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    Ok(nonce)
}

fn note(refused: &mut Vec<String>, address: SocketAddr, what: &str) {
    let line = format!("{address}: {what}");
    if refused.len() < MAX_REFUSED && !refused.contains(&line) {
        refused.push(line);
    }
}
