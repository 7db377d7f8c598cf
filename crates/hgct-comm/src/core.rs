//! What a communicator's callers and its transports' threads share: mailbox, states, records.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;

use hgct_core::ids::{Generation, Rank};

use crate::buffer::{Pool, PooledBuffer};
use crate::error::{Context, Error, Operation, Result};
use crate::message::Received;
use crate::record::{Direction, MAX_RECORDS, PeerStatistics, TransferRecord};
use crate::sync::{locked, wait_until};
use crate::tag::{Tag, TagKind};
use crate::ticket::{SendState, Times};
use crate::time::{Deadline, monotonic_ns};
use crate::transport::{Loss, Outgoing, Sink, Transport};
use crate::wire::{FrameKind, Header};

/// A message's place in the mailbox.
pub(crate) type Key = (Rank, Tag);

/// Shared state of one communicator.
pub(crate) struct Core {
    pub(crate) me: Rank,
    pub(crate) generation: Generation,
    /// First four bytes of the run id's digest.
    pub(crate) run: u32,
    pub(crate) pool: Arc<Pool>,
    /// Arrivals become visible this much later (tests only).
    delay_ns: u64,
    /// Unread bytes of a peer above which its connection is read only while someone waits for it.
    unread_limit_bytes: u64,
    same_host: BTreeMap<Rank, bool>,
    state: Mutex<State>,
    /// A peer that was held back may go on.
    drained: Condvar,
    failed: AtomicBool,
    links: OnceLock<BTreeMap<Rank, Weak<dyn Transport>>>,
}

struct State {
    mailbox: BTreeMap<Key, VecDeque<Received>>,
    peers: BTreeMap<Rank, PeerState>,
    waiters: BTreeMap<u64, Waiter>,
    next_waiter: u64,
    /// Sends that wait for room in their queue.
    blocked_sends: u32,
    failure: Option<Arc<Error>>,
    ended: bool,
    records: VecDeque<TransferRecord>,
    records_dropped: u64,
}

#[derive(Default)]
struct PeerState {
    left: bool,
    unread_bytes: u64,
    /// Messages to it that are queued or under way, and since when there is one.
    sending: u64,
    sending_since_ns: u64,
    statistics: PeerStatistics,
}

struct Waiter {
    wants: Vec<Key>,
    signal: Arc<Condvar>,
}

/// How a core is made.
pub(crate) struct CoreOptions {
    pub(crate) me: Rank,
    pub(crate) generation: Generation,
    pub(crate) run: u32,
    pub(crate) delay_ns: u64,
    pub(crate) unread_limit_bytes: u64,
    pub(crate) pool_bytes: usize,
    /// The other ranks, each with whether it shares this host.
    pub(crate) peers: BTreeMap<Rank, bool>,
}

impl Core {
    pub(crate) fn new(options: CoreOptions) -> Arc<Self> {
        let peers = options.peers.keys().map(|&rank| (rank, PeerState::default())).collect();
        Arc::new(Self {
            me: options.me,
            generation: options.generation,
            run: options.run,
            pool: Pool::new(options.pool_bytes),
            delay_ns: options.delay_ns,
            unread_limit_bytes: options.unread_limit_bytes,
            same_host: options.peers,
            state: Mutex::new(State {
                mailbox: BTreeMap::new(),
                peers,
                waiters: BTreeMap::new(),
                next_waiter: 0,
                blocked_sends: 0,
                failure: None,
                ended: false,
                records: VecDeque::new(),
                records_dropped: 0,
            }),
            drained: Condvar::new(),
            failed: AtomicBool::new(false),
            links: OnceLock::new(),
        })
    }

    /// Names the transports, so that a failure can release what waits in their queues.
    pub(crate) fn set_links(&self, links: BTreeMap<Rank, Weak<dyn Transport>>) {
        // Called once, by the constructor of the communicator.
        let _ = self.links.set(links);
        if self.failed.load(Ordering::SeqCst) {
            self.cancel_sends();
        }
    }

    pub(crate) fn context(&self, operation: Operation, peer: Option<Rank>) -> Context {
        Context {
            rank: self.me,
            peer,
            operation,
            tag: None,
            generation: self.generation,
            sequence: None,
            bytes: None,
        }
    }

    /// Fails with what broke the communicator, in the caller's words.
    pub(crate) fn check(&self, context: &Context) -> Result<()> {
        if !self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        Self::check_locked(&locked(&self.state), context)
    }

    fn check_locked(state: &State, context: &Context) -> Result<()> {
        let Some(cause) = &state.failure else { return Ok(()) };
        let context = Box::new(context.clone());
        Err(match &**cause {
            Error::PeerDead { context: first, source } if first.peer == context.peer => {
                Error::PeerDead { context, source: Arc::clone(source) }
            }
            Error::Aborted { .. } => Error::Aborted { context },
            _ => Error::Broken { context, cause: Arc::clone(cause) },
        })
    }

    /// Breaks the communicator with its first error; later ones change nothing. Returns `error`.
    pub(crate) fn fail(&self, error: Error) -> Error {
        let mut state = locked(&self.state);
        if state.failure.is_none() {
            state.failure = Some(Arc::new(error.clone()));
            // Nobody will read them: an error is all that is said from now on.
            state.mailbox.clear();
            self.failed.store(true, Ordering::SeqCst);
            for waiter in state.waiters.values() {
                waiter.signal.notify_all();
            }
            drop(state);
            self.drained.notify_all();
            self.cancel_sends();
        }
        error
    }

    /// Waits until every peer has said goodbye, something fails or the deadline comes.
    pub(crate) fn wait_for_goodbyes(&self, deadline: Deadline) {
        let mut state = locked(&self.state);
        while state.failure.is_none() && state.peers.values().any(|peer| !peer.left) && !deadline.has_passed()
        {
            state = wait_until(&self.drained, state, deadline);
        }
    }

    /// The communicator is over: nothing that a connection does is news from now on.
    pub(crate) fn end(&self) {
        locked(&self.state).ended = true;
        self.fail(Error::Aborted { context: Box::new(self.context(Operation::Close, None)) });
    }

    pub(crate) fn has_ended(&self) -> bool {
        locked(&self.state).ended
    }

    fn cancel_sends(&self) {
        for link in self.links.get().into_iter().flat_map(BTreeMap::values).filter_map(Weak::upgrade) {
            link.cancel();
        }
    }

    pub(crate) fn failure(&self) -> Option<Arc<Error>> {
        locked(&self.state).failure.clone()
    }

    pub(crate) fn has_left(&self, peer: Rank) -> bool {
        locked(&self.state).peers.get(&peer).is_some_and(|state| state.left)
    }

    /// Waits for the first of several messages; `None` at the deadline.
    pub(crate) fn wait_any(
        &self,
        keys: &[Key],
        deadline: Deadline,
        context: &Context,
    ) -> Result<Option<(usize, Received)>> {
        let mut state = locked(&self.state);
        let mut waiting: Option<(u64, Arc<Condvar>)> = None;
        let result = loop {
            if let Err(error) = Self::check_locked(&state, context) {
                break Err(error);
            }
            let now_ns = monotonic_ns();
            let mut earliest_ns = deadline.ns();
            if let Some(found) = self.take_first(&mut state, keys, now_ns, &mut earliest_ns) {
                break Ok(Some(found));
            }
            if let Some(gone) = Self::nobody_can_send(&state, keys) {
                let mut context = context.clone();
                context.peer = Some(gone);
                break Err(Error::PeerLeft { context: Box::new(context) });
            }
            if now_ns >= deadline.ns() {
                break Ok(None);
            }
            let signal = match &waiting {
                Some((_, signal)) => Arc::clone(signal),
                None => self.register(&mut state, keys, &mut waiting),
            };
            state = wait_until(&signal, state, Deadline::at_ns(earliest_ns));
        };
        if let Some((id, _)) = waiting {
            state.waiters.remove(&id);
        }
        result
    }

    fn register(
        &self,
        state: &mut MutexGuard<'_, State>,
        keys: &[Key],
        waiting: &mut Option<(u64, Arc<Condvar>)>,
    ) -> Arc<Condvar> {
        let id = state.next_waiter;
        state.next_waiter += 1;
        let signal = Arc::new(Condvar::new());
        let waiter = Waiter { wants: keys.to_vec(), signal: Arc::clone(&signal) };
        state.waiters.insert(id, waiter);
        *waiting = Some((id, Arc::clone(&signal)));
        // A connection that was held back is read again: the message may be behind others.
        self.drained.notify_all();
        signal
    }

    /// Takes the first visible message; else lowers `earliest_ns` to when one becomes visible.
    fn take_first(
        &self,
        state: &mut State,
        keys: &[Key],
        now_ns: u64,
        earliest_ns: &mut u64,
    ) -> Option<(usize, Received)> {
        for (index, key) in keys.iter().enumerate() {
            let Some(queue) = state.mailbox.get_mut(key) else { continue };
            let Some(visible_ns) = queue.front().map(|message| message.times().end_ns) else {
                continue;
            };
            if visible_ns > now_ns {
                *earliest_ns = visible_ns.min(*earliest_ns);
                continue;
            }
            let message = queue.pop_front()?;
            if queue.is_empty() {
                state.mailbox.remove(key);
            }
            if let Some(peer) = state.peers.get_mut(&key.0) {
                peer.unread_bytes -= message.len() as u64;
                if peer.unread_bytes <= self.unread_limit_bytes {
                    self.drained.notify_all();
                }
            }
            return Some((index, message));
        }
        None
    }

    /// A peer, if all that could still answer have left and nothing of theirs is on its way.
    fn nobody_can_send(state: &State, keys: &[Key]) -> Option<Rank> {
        let silent = |key: &Key| {
            state.peers.get(&key.0).is_some_and(|peer| peer.left) && !state.mailbox.contains_key(key)
        };
        if keys.iter().all(silent) { keys.first().map(|key| key.0) } else { None }
    }

    /// Books a message before it goes to its transport. Only data counts: probes and goodbyes are not
    /// what training waits for.
    pub(crate) fn sending(&self, peer: Rank, header: &Header) {
        if header.kind != FrameKind::Data {
            return;
        }
        if let Some(state) = locked(&self.state).peers.get_mut(&peer) {
            if state.sending == 0 {
                state.sending_since_ns = header.queued_ns;
            }
            state.sending += 1;
        }
    }

    /// Books that a message is no longer under way.
    pub(crate) fn not_sending(&self, peer: Rank, kind: FrameKind) {
        if kind != FrameKind::Data {
            return;
        }
        if let Some(state) = locked(&self.state).peers.get_mut(&peer) {
            state.sending_ends(monotonic_ns());
        }
    }

    pub(crate) fn drain_transfers(&self) -> (Vec<TransferRecord>, u64) {
        let mut state = locked(&self.state);
        let dropped = std::mem::take(&mut state.records_dropped);
        (std::mem::take(&mut state.records).into(), dropped)
    }

    pub(crate) fn statistics(&self) -> BTreeMap<Rank, PeerStatistics> {
        let state = locked(&self.state);
        state.peers.iter().map(|(&rank, peer)| (rank, peer.statistics)).collect()
    }

    /// Whether the header belongs to this run and generation.
    fn check_header(&self, header: &Header) -> Result<(), String> {
        if header.run != self.run {
            return Err("a message of another run".into());
        }
        if header.generation != self.generation {
            return Err(format!("a message of {}, here is {}", header.generation, self.generation));
        }
        Ok(())
    }

    /// Waits while the peer has too much unread and this rank computes. A rank that waits, for
    /// whatever message or for room in a queue, reads from everybody: ranks that held each other back
    /// while they wait would wait in a circle. Then what is unread is bounded by the schedule alone.
    fn hold_back(&self, peer: Rank, bytes: u64) {
        let mut state = locked(&self.state);
        loop {
            let unread = state.peers.get(&peer).map_or(0, |state| state.unread_bytes);
            if state.failure.is_some()
                || unread == 0
                || unread + bytes <= self.unread_limit_bytes
                || !state.waiters.is_empty()
                || state.blocked_sends > 0
            {
                return;
            }
            // Ends with a read, a waiter, a failure or the communicator's end.
            state = wait_until(&self.drained, state, Deadline::after(Duration::from_hours(1)));
        }
    }

    fn deliver(&self, message: Received) {
        let key = (message.peer(), message.tag());
        let bytes = message.len() as u64;
        let times = message.times();
        let mut state = locked(&self.state);
        if state.failure.is_some() {
            return;
        }
        let counts = key.1.kind != TagKind::Link;
        if let Some(peer) = state.peers.get_mut(&key.0) {
            peer.unread_bytes += bytes;
            peer.statistics.bytes_received += bytes;
            peer.statistics.messages_received += u64::from(counts);
        }
        state.mailbox.entry(key).or_default().push_back(message);
        if counts {
            state.record(key, Direction::Receive, bytes, times);
        }
        for waiter in state.waiters.values() {
            if waiter.wants.contains(&key) {
                waiter.signal.notify_all();
            }
        }
    }

    fn goodbye(&self, peer: Rank) {
        let mut state = locked(&self.state);
        if let Some(peer) = state.peers.get_mut(&peer) {
            peer.left = true;
        }
        for waiter in state.waiters.values() {
            waiter.signal.notify_all();
        }
        drop(state);
        self.drained.notify_all();
    }

    /// Answers a ping from the reader's thread, without waiting.
    fn pong(&self, peer: Rank, ping: &Header) {
        let header = Header { kind: FrameKind::Pong, bytes: 0, ..*ping };
        // The first ping may be here before the last connection is.
        let link = self.links.wait().get(&peer).and_then(Weak::upgrade);
        if let Some(link) = link {
            // A peer that cannot be answered will be found lost by its reader.
            let _ = link.submit(Outgoing::empty(header), Deadline::at_ns(0));
        }
    }
}

impl State {
    fn record(&mut self, key: Key, direction: Direction, bytes: u64, times: Times) {
        if self.records.len() == MAX_RECORDS {
            self.records.pop_front();
            self.records_dropped += 1;
        }
        self.records.push_back(TransferRecord {
            peer: key.0,
            tag: key.1,
            direction,
            bytes,
            queued_ns: times.queued_ns,
            start_ns: times.start_ns,
            end_ns: times.end_ns,
        });
    }
}

impl PeerState {
    fn sending_ends(&mut self, now_ns: u64) {
        self.sending -= 1;
        if self.sending == 0 {
            self.statistics.send_pending_ns += now_ns.saturating_sub(self.sending_since_ns);
        }
    }
}

impl Sink for Core {
    fn begin(&self, peer: Rank, header: &Header) -> Result<PooledBuffer, String> {
        self.check_header(header)?;
        if header.kind == FrameKind::Data {
            self.hold_back(peer, header.bytes);
        }
        Ok(self.pool.take(header.bytes as usize))
    }

    fn delivered(&self, peer: Rank, header: &Header, payload: PooledBuffer, start_ns: u64) {
        let end_ns = monotonic_ns();
        let same_host = self.same_host.get(&peer) == Some(&true);
        let queued_ns = if same_host { header.queued_ns } else { start_ns };
        match header.kind {
            FrameKind::Data | FrameKind::Pong => {
                let times = Times { queued_ns, start_ns, end_ns: end_ns + self.delay_ns };
                self.deliver(Received::new(peer, header.tag, payload, times));
            }
            FrameKind::Goodbye => self.goodbye(peer),
            FrameKind::Ping => self.pong(peer, header),
            FrameKind::Discard => {}
        }
    }

    fn sent(&self, peer: Rank, message: Outgoing, start_ns: u64) {
        let end_ns = monotonic_ns();
        let times = Times { queued_ns: message.header.queued_ns, start_ns, end_ns };
        let Outgoing { header, payload, ticket } = message;
        // The lease ends before its holder hears of it.
        drop(payload);
        let mut state = locked(&self.state);
        if header.kind == FrameKind::Data {
            if let Some(peer) = state.peers.get_mut(&peer) {
                peer.sending_ends(end_ns);
                peer.statistics.bytes_sent += header.bytes;
                peer.statistics.messages_sent += 1;
            }
            state.record((peer, header.tag), Direction::Send, header.bytes, times);
        }
        drop(state);
        ticket.finish(SendState::Sent(times));
    }

    fn dropped(&self, peer: Rank, message: Outgoing) {
        let Outgoing { header, payload, ticket } = message;
        drop(payload);
        self.not_sending(peer, header.kind);
        ticket.finish(SendState::Dropped);
    }

    fn send_blocked(&self, blocked: bool) {
        let mut state = locked(&self.state);
        if blocked {
            state.blocked_sends += 1;
            self.drained.notify_all();
        } else {
            state.blocked_sends -= 1;
        }
    }

    fn lost(&self, peer: Rank, loss: Loss) {
        if self.has_left(peer) {
            // What ends after a goodbye is no loss.
            return;
        }
        let context = Box::new(self.context(Operation::Receive, Some(peer)));
        self.fail(match loss {
            Loss::Ended(source) => Error::PeerDead { context, source: Arc::new(named(source)) },
            Loss::Protocol(found) => Error::Protocol { context, found },
        });
    }
}

/// An end of file in the words of connections.
fn named(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed")
    } else {
        error
    }
}
