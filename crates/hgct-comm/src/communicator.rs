//! One group of ranks in one generation, talking.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use hgct_core::dtype::MemoryKind;
use hgct_core::ids::{Generation, Rank};

use crate::buffer::SendBuffer;
use crate::connect::{ConnectOptions, Connected, Tuning, connect};
use crate::core::{Core, CoreOptions};
use crate::error::{Context, Error, Operation, Result};
use crate::key::run_digest;
use crate::message::Received;
use crate::record::{PeerStatistics, TransferRecord};
use crate::shm::{SharedMemory, watch};
use crate::stream::StreamTransport;
use crate::sync::locked;
use crate::tag::{Tag, TagKind};
use crate::tcp::Tcp;
use crate::ticket::{SendState, SendTicket};
use crate::time::{Deadline, monotonic_ns};
use crate::transport::{Outgoing, Region, RegionRange, Sink, SubmitError, Transport};
use crate::wire::{FrameKind, Header, MAX_MESSAGE_BYTES, u32_at};

/// How long a drop waits for queued messages and goodbyes.
const DROP_WAIT: Duration = Duration::from_millis(250);

/// How long threads of connections that are shut down may take to end.
const JOIN_WAIT: Duration = Duration::from_secs(1);

/// Point-to-point messages and collectives of one group in one generation.
///
/// All calls may be made from any thread. A communicator that has failed in any call (a passed
/// deadline counts) repeats that it has until it is replaced: ranks that no longer agree on what was
/// sent cannot go on. What only *asks* never fails by waiting: [`try_recv`](Self::try_recv),
/// [`poll_any`](Self::poll_any).
///
/// Leave with [`close`](Self::close); a drop does it with a short deadline. A process that ends
/// without either looks dead to its peers.
pub struct Communicator {
    pub(crate) core: Arc<Core>,
    links: BTreeMap<Rank, Arc<dyn Transport>>,
    ranks: Vec<Rank>,
    /// Watches the peers on this host.
    watch: Mutex<Option<thread::JoinHandle<()>>>,
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Communicator({} of {}, {})", self.rank(), self.size(), self.generation())
    }
}

impl Communicator {
    /// Connects with every other member; all of them must call it. Waits at most until the deadline
    /// of the options.
    pub fn connect(options: &ConnectOptions<'_>) -> Result<Self> {
        let connected = connect(options)?;
        let host = |rank: Rank| {
            options.group.iter().find(|peer| peer.rank == rank).map(|peer| peer.host_id.as_str())
        };
        let my_host = host(options.me);
        let core = Core::new(CoreOptions {
            me: options.me,
            generation: options.generation,
            run: u32_at(&run_digest(&options.run), 0),
            delay_ns: options.test_delay_ns,
            unread_limit_bytes: options.tuning.unread_bytes,
            pool_bytes: options.tuning.pool_bytes,
            peers: connected.keys().map(|&rank| (rank, host(rank) == my_host)).collect(),
        });
        let mut ranks: Vec<Rank> = options.group.iter().map(|peer| peer.rank).collect();
        ranks.sort_unstable();
        let mut this = Self { core, links: BTreeMap::new(), ranks, watch: Mutex::default() };
        if let Err((rank, source)) = this.start(connected, &options.tuning) {
            this.core.set_links(BTreeMap::new());
            this.abort();
            return Err(Error::System {
                context: Box::new(this.core.context(Operation::Connect, Some(rank))),
                action: "start the threads of a connection",
                source: Arc::new(source),
            });
        }
        let weak = this.links.iter().map(|(&rank, link)| (rank, Arc::downgrade(link)));
        this.core.set_links(weak.collect());
        Ok(this)
    }

    /// Gives each connection its transport.
    fn start(
        &mut self,
        connected: BTreeMap<Rank, Connected>,
        tuning: &Tuning,
    ) -> Result<(), (Rank, io::Error)> {
        let mut shared = Vec::new();
        for (rank, Connected { stream, rings, dialled }) in connected {
            let sink: Arc<dyn Sink> = Arc::clone(&self.core) as _;
            let limit_bytes = tuning.queue_bytes;
            let link = (|| -> io::Result<Arc<dyn Transport>> {
                let Some(rings) = rings else {
                    let tcp = Tcp::new(stream, tuning.socket_buffer_bytes)?;
                    return Ok(Arc::new(StreamTransport::start(tcp, rank, sink, limit_bytes)?));
                };
                let memory = SharedMemory::new(rings, dialled, stream)?;
                shared.push(memory.clone());
                Ok(Arc::new(StreamTransport::start(memory, rank, sink, limit_bytes)?))
            })();
            self.links.insert(rank, link.map_err(|source| (rank, source))?);
        }
        if !shared.is_empty() {
            let thread = watch(shared).map_err(|source| (self.core.me, source))?;
            *locked(&self.watch) = Some(thread);
        }
        Ok(())
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.core.me
    }

    /// Members of the group, this rank too.
    pub fn size(&self) -> usize {
        self.ranks.len()
    }

    /// All members in rank order.
    pub fn ranks(&self) -> &[Rank] {
        &self.ranks
    }

    /// The generation it belongs to.
    pub fn generation(&self) -> Generation {
        self.core.generation
    }

    /// Name of the transport to a peer: `tcp`, `shared-memory`.
    pub fn transport_to(&self, peer: Rank) -> Result<&'static str> {
        Ok(self.link(peer, &self.context(Operation::Send, peer))?.capabilities().name)
    }

    /// Sends host memory. Returns once it is queued: waits for room in the peer's queue until the
    /// deadline at most, never for the wire. Owned memory and leases leave without a copy; a lease is
    /// dropped on a thread of the transport.
    pub fn send(
        &self,
        peer: Rank,
        tag: Tag,
        buffer: impl Into<SendBuffer>,
        deadline: Deadline,
    ) -> Result<SendTicket> {
        let context = self.context(Operation::Send, peer);
        let region = self.link(peer, &context)?.register(buffer.into(), MemoryKind::Host)?;
        self.send_range(peer, tag, region.whole(), deadline)
    }

    /// Sends part of a region registered with the peer's transport, see [`register`](Self::register).
    pub fn send_range(
        &self,
        peer: Rank,
        tag: Tag,
        range: RegionRange,
        deadline: Deadline,
    ) -> Result<SendTicket> {
        let mut context = self.context(Operation::Send, peer);
        context.tag = Some(tag);
        context.bytes = Some(range.len() as u64);
        self.submit(peer, FrameKind::Data, tag, range, deadline, &context)
    }

    /// Makes memory known to the transport of a peer, to send parts of it.
    pub fn register(
        &self,
        peer: Rank,
        memory: impl Into<SendBuffer>,
        kind: MemoryKind,
    ) -> Result<Arc<Region>> {
        self.link(peer, &self.context(Operation::Send, peer))?.register(memory.into(), kind)
    }

    /// Waits for a message. A passed deadline breaks the communicator.
    pub fn recv(&self, peer: Rank, tag: Tag, deadline: Deadline) -> Result<Received> {
        let context = self.receive_context(Operation::Receive, peer, Some(tag));
        self.recv_as(&[(peer, tag)], deadline, &context).map(|(_, message)| message)
    }

    /// Waits for the first of several messages, and says which. A passed deadline breaks the
    /// communicator.
    pub fn recv_any(&self, wanted: &[(Rank, Tag)], deadline: Deadline) -> Result<(usize, Received)> {
        self.recv_as(wanted, deadline, &self.any_context(wanted))
    }

    /// The message, if it has arrived.
    pub fn try_recv(&self, peer: Rank, tag: Tag) -> Result<Option<Received>> {
        let found = self.poll_any(&[(peer, tag)], Deadline::at_ns(0))?;
        Ok(found.map(|(_, message)| message))
    }

    /// Waits a while for the first of several messages. `None` where none came until then, which
    /// breaks nothing.
    pub fn poll_any(&self, wanted: &[(Rank, Tag)], until: Deadline) -> Result<Option<(usize, Received)>> {
        let context = self.any_context(wanted);
        self.check_members(wanted, &context)?;
        self.core.wait_any(wanted, until, &context)
    }

    /// Ends everything here at once: waits return with an error, connections close, peers see this
    /// rank dead. Local, prompt, idempotent; call it from any thread.
    pub fn abort(&self) {
        self.core.fail(Error::Aborted { context: Box::new(self.core.context(Operation::Close, None)) });
        for link in self.links.values() {
            link.shut_down();
        }
    }

    /// The error that broke it, if one did.
    pub fn failure(&self) -> Option<Arc<Error>> {
        self.core.failure()
    }

    /// Leaves in order: sends what is queued and a goodbye, waits for the goodbyes of the others
    /// until the deadline, then ends the connections. Says whether everything queued has left.
    pub fn close(&self, deadline: Deadline) -> bool {
        self.leave(deadline)
    }

    /// Records of all messages moved since the last call, oldest first, and how many were lost
    /// because nobody drained them in time.
    pub fn drain_transfers(&self) -> (Vec<TransferRecord>, u64) {
        self.core.drain_transfers()
    }

    /// Sums by peer.
    pub fn statistics(&self) -> BTreeMap<Rank, PeerStatistics> {
        self.core.statistics()
    }

    fn context(&self, operation: Operation, peer: Rank) -> Context {
        self.core.context(operation, Some(peer))
    }

    pub(crate) fn receive_context(&self, operation: Operation, peer: Rank, tag: Option<Tag>) -> Context {
        Context { tag, ..self.context(operation, peer) }
    }

    fn any_context(&self, wanted: &[(Rank, Tag)]) -> Context {
        let first = wanted.first();
        let context = self.core.context(Operation::Receive, first.map(|key| key.0));
        Context { tag: first.map(|key| key.1), ..context }
    }

    fn link(&self, peer: Rank, context: &Context) -> Result<&Arc<dyn Transport>> {
        self.links.get(&peer).ok_or_else(|| Error::NotAMember { context: Box::new(context.clone()) })
    }

    fn check_members(&self, wanted: &[(Rank, Tag)], context: &Context) -> Result<()> {
        for (peer, tag) in wanted {
            self.link(*peer, &Context { peer: Some(*peer), tag: Some(*tag), ..context.clone() })?;
        }
        Ok(())
    }

    pub(crate) fn recv_as(
        &self,
        wanted: &[(Rank, Tag)],
        deadline: Deadline,
        context: &Context,
    ) -> Result<(usize, Received)> {
        self.check_members(wanted, context)?;
        let begun_ns = monotonic_ns();
        match self.core.wait_any(wanted, deadline, context) {
            Ok(Some(found)) => Ok(found),
            Ok(None) => Err(self.core.fail(Error::Deadline {
                context: Box::new(context.clone()),
                waited_ns: monotonic_ns().saturating_sub(begun_ns),
            })),
            Err(error) => Err(self.core.fail(error)),
        }
    }

    pub(crate) fn submit(
        &self,
        peer: Rank,
        kind: FrameKind,
        tag: Tag,
        payload: RegionRange,
        deadline: Deadline,
        context: &Context,
    ) -> Result<SendTicket> {
        let link = self.link(peer, context)?;
        self.core.check(context)?;
        let bytes = payload.len() as u64;
        if bytes > MAX_MESSAGE_BYTES {
            let context = Box::new(context.clone());
            return Err(Error::TooLarge { context, limit_bytes: MAX_MESSAGE_BYTES });
        }
        let error = match self.submit_unchecked(peer, link, kind, tag, payload, deadline) {
            Ok(ticket) => return Ok(ticket),
            Err(error) => error,
        };
        self.core.check(context)?;
        let context = Box::new(context.clone());
        Err(self.core.fail(match error {
            SubmitError::Full { queued_bytes, limit_bytes } => {
                Error::QueueFull { context, queued_bytes, limit_bytes }
            }
            SubmitError::Closed => Error::PeerLeft { context },
        }))
    }

    fn submit_unchecked(
        &self,
        peer: Rank,
        link: &Arc<dyn Transport>,
        kind: FrameKind,
        tag: Tag,
        payload: RegionRange,
        deadline: Deadline,
    ) -> Result<SendTicket, SubmitError> {
        let ticket = SendTicket::new();
        let header = Header {
            kind,
            tag,
            run: self.core.run,
            generation: self.core.generation,
            sequence: 0,
            bytes: payload.len() as u64,
            queued_ns: monotonic_ns(),
        };
        self.core.sending(peer, &header);
        let outgoing = Outgoing { header, payload, ticket: ticket.clone() };
        link.submit(outgoing, deadline).inspect_err(|_| self.core.not_sending(peer, kind))?;
        Ok(ticket)
    }

    /// Says goodbye to everyone and ends the connections.
    fn leave(&self, deadline: Deadline) -> bool {
        if self.core.has_ended() {
            return false;
        }
        let mut all = self.core.failure().is_none();
        if all {
            let tag = Tag::new(TagKind::User, 0, 0, 0);
            let staying = self.links.iter().filter(|(peer, _)| !self.core.has_left(**peer));
            let goodbyes: Vec<_> = staying
                .map(|(&peer, link)| {
                    let nothing = Region::new(Vec::<u8>::new().into(), MemoryKind::Host).whole();
                    self.submit_unchecked(peer, link, FrameKind::Goodbye, tag, nothing, deadline)
                })
                .collect();
            for goodbye in goodbyes {
                let sent = goodbye.map(|ticket| ticket.wait(deadline));
                all &= matches!(sent, Ok(SendState::Sent(_)));
            }
            // Closing with arrivals unread would reset the connection and with it what we sent.
            self.core.wait_for_goodbyes(deadline);
        }
        self.core.end();
        for link in self.links.values() {
            link.shut_down();
        }
        let deadline = Deadline::after(JOIN_WAIT);
        for link in self.links.values() {
            link.join(deadline);
        }
        if let Some(watch) = locked(&self.watch).take() {
            // It ends with the connections that were just shut down.
            let _ = watch.join();
        }
        all
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.leave(Deadline::after(DROP_WAIT));
    }
}
