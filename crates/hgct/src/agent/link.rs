//! The control connection, from the agent's side.

use std::collections::BTreeMap;
use std::io::{self, Read, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs as _};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use hgct_control::auth::{Handshake, Peer, Token};
use hgct_control::frame::{Decoder, encode_header};
use hgct_control::message::{Envelope, FromAgent, ToAgent};
use hgct_core::ids::{DeviceId, NodeId};

use super::Wake;
use super::budget::Budget;

/// A coordinator that has not proved itself by then is none.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Between two tries to reach it.
const RETRY: Duration = Duration::from_millis(200);
/// How long a worker may leave its orders in the pipe before it is given up: less than the silence
/// after which agent and coordinator give each other up, since nothing else is read meanwhile.
const ORDERS: Duration = Duration::from_millis(1500);
/// The same for the disk under the content store.
const DISK: Duration = Duration::from_secs(2);

/// An authenticated connection and what both sides agreed on.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) stream: TcpStream,
    pub(super) peer: Peer,
}

/// Connects and proves both sides; tries again until `wait` is over while nobody listens.
pub(super) fn join(address: &str, token: &Token, node: &NodeId, wait: Duration) -> Result<Joined> {
    let deadline = Instant::now() + wait;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).max(RETRY);
        match connect(address, left.min(HANDSHAKE)) {
            Ok(stream) => {
                let peer = prove(&stream, token, node).with_context(|| format!("joining {address}"))?;
                return Ok(Joined { stream, peer });
            }
            Err(error) if Instant::now() + RETRY >= deadline => {
                let wait = wait.as_secs();
                return Err(error)
                    .with_context(|| format!("no coordinator answered at {address} within {wait} s"));
            }
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}

fn connect(address: &str, within: Duration) -> io::Result<TcpStream> {
    let addresses: Vec<SocketAddr> = address.to_socket_addrs()?.collect();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, within) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The agent's side of the handshake, at most [`HANDSHAKE`] in all.
fn prove(mut stream: &TcpStream, token: &Token, node: &NodeId) -> Result<Peer> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(|error| anyhow!("no randomness: {error}"))?;
    let deadline = Instant::now() + HANDSHAKE;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(HANDSHAKE))?;
    let mut handshake = Handshake::client(token.clone(), node, nonce);
    loop {
        stream.write_all(&handshake.output())?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("the coordinator did not prove itself within {} s", HANDSHAKE.as_secs());
        }
        stream.set_read_timeout(Some(left))?;
        let mut bytes = vec![0; handshake.wanted()];
        let read = stream.read(&mut bytes).context("the handshake was cut off")?;
        if read == 0 {
            bail!("the coordinator closed the connection inside of the handshake");
        }
        let received = handshake.receive(&bytes[..read]);
        let output = handshake.output();
        if let Some(peer) = received.inspect_err(|_| drop(stream.write_all(&output)))? {
            stream.set_read_timeout(None)?;
            stream.set_write_timeout(None)?;
            return Ok(peer);
        }
        stream.write_all(&output)?;
    }
}

/// Room on the ways that the connection's reader feeds.
#[derive(Debug)]
pub(super) struct Windows {
    /// Orders to each worker.
    orders: Mutex<BTreeMap<DeviceId, Arc<Budget>>>,
    /// Pieces to the content store.
    pub(super) blobs: Arc<Budget>,
}

impl Windows {
    pub(super) fn new(blob_bytes: usize) -> Self {
        Self { orders: Mutex::default(), blobs: Arc::new(Budget::new(blob_bytes)) }
    }

    /// From now on orders to `worker` take room there.
    pub(super) fn open(&self, worker: DeviceId, window: Arc<Budget>) {
        self.lock().insert(worker, window);
    }

    /// The room that a message's payload takes.
    pub(super) fn of(&self, message: &ToAgent) -> Option<Arc<Budget>> {
        match message {
            ToAgent::Forward { worker, .. } => self.lock().get(worker).cloned(),
            ToAgent::BlobChunk { .. } => Some(Arc::clone(&self.blobs)),
            _ => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<DeviceId, Arc<Budget>>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The writing half; a thread of its own writes.
#[derive(Debug)]
pub(super) struct Link {
    frames: Sender<(Vec<u8>, Vec<u8>)>,
    writer: JoinHandle<()>,
    stream: TcpStream,
}

impl Link {
    /// Starts reader and writer. What the workers' readers took from `said` is given back as it
    /// leaves.
    pub(super) fn start(
        stream: TcpStream,
        wakes: &Sender<Wake>,
        windows: Arc<Windows>,
        said: Arc<Budget>,
    ) -> io::Result<Self> {
        let (reading, writing) = (stream.try_clone()?, stream.try_clone()?);
        let (frames, outgoing) = channel();
        let wakes = wakes.clone();
        std::thread::Builder::new().name("hgct-link-read".into()).spawn(move || {
            let cause = read(&reading, &wakes, &windows);
            // Nobody listens any more once the agent leaves.
            let _ = wakes.send(Wake::Lost { cause });
        })?;
        let writer = std::thread::Builder::new()
            .name("hgct-link-write".into())
            .spawn(move || write(writing, &outgoing, &said))?;
        Ok(Self { frames, writer, stream })
    }

    /// Queues a message.
    pub(super) fn send(&self, envelope: &Envelope<FromAgent>, payload: Vec<u8>) {
        match encode_header(envelope, payload.len()) {
            // A writer that has ended tells by the reader.
            Ok(header) => drop(self.frames.send((header, payload))),
            Err(error) => eprintln!("hgct agent: a message cannot be sent: {error}"),
        }
    }

    /// Sends what is queued, for at most `within`, and closes.
    pub(super) fn close(self, within: Duration) {
        let _ = self.stream.set_write_timeout(Some(within));
        drop(self.frames);
        let deadline = Instant::now() + within;
        while !self.writer.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Reads until the connection ends; answers why it did.
fn read(mut stream: &TcpStream, wakes: &Sender<Wake>, windows: &Windows) -> String {
    let mut decoder = Decoder::<ToAgent>::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match decoder.next_frame() {
            Ok(Some((envelope, payload))) => {
                if let Some(stuck) = wait_for_room(&envelope.message, payload.len(), windows)
                    && wakes.send(Wake::Stuck { worker: stuck }).is_err()
                {
                    return "the agent leaves".into();
                }
                if wakes.send(Wake::Order { envelope: Box::new(envelope), payload }).is_err() {
                    return "the agent leaves".into();
                }
            }
            Ok(None) => match stream.read(&mut buffer) {
                Ok(0) => return "the coordinator closed the connection".into(),
                Ok(read) => decoder.push(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return format!("the connection to the coordinator failed: {error}"),
            },
            Err(error) => return format!("the coordinator does not speak our protocol: {error}"),
        }
    }
}

/// Waits until there is room for a payload where it goes; the worker that makes none in time.
fn wait_for_room(message: &ToAgent, bytes: usize, windows: &Windows) -> Option<DeviceId> {
    if bytes == 0 {
        return None;
    }
    let window = windows.of(message)?;
    match message {
        ToAgent::Forward { worker, .. } if !window.take(bytes, ORDERS) => Some(worker.clone()),
        ToAgent::Forward { .. } => None,
        // A slow disk costs memory for a while, no more.
        _ => {
            window.take(bytes, DISK);
            None
        }
    }
}

fn write(mut stream: TcpStream, frames: &Receiver<(Vec<u8>, Vec<u8>)>, said: &Budget) {
    let mut broken = false;
    for (header, payload) in frames {
        if !broken {
            broken = stream.write_all(&header).and_then(|()| stream.write_all(&payload)).is_err();
        }
        said.give(payload.len());
    }
    // The workers' readers must not wait for a writer that is gone.
    said.close();
    let _ = stream.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use hgct_control::frame::{Outbox, encode};
    use hgct_core::ids::{Generation, RunId};

    use super::*;

    fn token(letter: &str) -> Token {
        Token::parse(&letter.repeat(32)).unwrap()
    }

    fn node() -> NodeId {
        NodeId::new("east").unwrap()
    }

    /// A coordinator's end that authenticates one agent and answers with its connection.
    fn coordinator(token: Token) -> (String, JoinHandle<Option<TcpStream>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serve = move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut handshake = Handshake::server(token, &RunId::new("run").unwrap(), [1; 32]);
            loop {
                stream.write_all(&handshake.output()).unwrap();
                let mut bytes = vec![0; handshake.wanted()];
                let read = stream.read(&mut bytes).unwrap();
                match handshake.receive(&bytes[..read]) {
                    Ok(None) => {}
                    Ok(Some(_)) => {
                        stream.write_all(&handshake.output()).unwrap();
                        return Some(stream);
                    }
                    Err(_) => {
                        stream.write_all(&handshake.output()).unwrap();
                        return None;
                    }
                }
            }
        };
        (address, std::thread::spawn(serve))
    }

    #[test]
    fn the_run_is_learnt_from_the_coordinator_and_frames_cross() {
        let (address, server) = coordinator(token("t"));
        let joined = join(&address, &token("t"), &node(), Duration::from_secs(20)).unwrap();
        assert_eq!(joined.peer.run.as_str(), "run");
        let mut server = server.join().unwrap().unwrap();
        let (wakes, inbox) = channel();
        let link =
            Link::start(joined.stream, &wakes, Arc::new(Windows::new(1)), Arc::new(Budget::new(1))).unwrap();
        let run = RunId::new("run").unwrap();
        let order = Outbox::new(run.clone()).seal(Generation::default(), ToAgent::Discover);
        server.write_all(&encode(&order, &[]).unwrap()).unwrap();
        assert!(matches!(inbox.recv().unwrap(), Wake::Order { envelope, .. } if *envelope == order));
        let answer = FromAgent::Leaving { reason: "test".into() };
        link.send(&Outbox::new(run).seal(Generation::default(), answer.clone()), vec![7; 9]);
        link.close(Duration::from_secs(20));
        let mut bytes = Vec::new();
        server.read_to_end(&mut bytes).unwrap();
        let mut decoder = Decoder::<FromAgent>::new();
        decoder.push(&bytes);
        let (envelope, payload) = decoder.next_frame().unwrap().unwrap();
        assert_eq!((envelope.message, payload), (answer, vec![7; 9]));
        drop(server);
        assert!(matches!(inbox.recv().unwrap(), Wake::Lost { .. }));
    }

    #[test]
    fn a_wrong_token_is_one_clear_error_and_not_tried_again() {
        let (address, server) = coordinator(token("t"));
        let error = join(&address, &token("u"), &node(), Duration::from_secs(20)).unwrap_err();
        assert!(format!("{error:#}").contains("token"), "{error:#}");
        assert!(server.join().unwrap().is_none());
    }

    #[test]
    fn garbage_is_no_coordinator() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || listener.accept().unwrap().0.write_all(&[b'x'; 600]));
        let error = join(&address, &token("t"), &node(), Duration::from_secs(20)).unwrap_err();
        assert!(format!("{error:#}").contains("is this a port of hgct?"), "{error:#}");
        let _ = server.join();
    }

    #[test]
    fn nobody_there_is_said_after_the_wait() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let error = join(&address, &token("t"), &node(), Duration::from_millis(1)).unwrap_err();
        assert!(format!("{error:#}").contains("no coordinator answered"), "{error:#}");
    }

    #[test]
    fn a_worker_that_takes_no_orders_is_named() {
        let worker = DeviceId::new("n/torch:0").unwrap();
        let windows = Windows::new(1);
        windows.open(worker.clone(), Arc::new(Budget::new(10)));
        let order =
            ToAgent::Forward { worker: worker.clone(), message: hgct_control::message::ToWorker::Exit };
        assert_eq!(wait_for_room(&order, 10, &windows), None);
        assert_eq!(wait_for_room(&order, 1, &windows), Some(worker));
        assert_eq!(wait_for_room(&order, 0, &windows), None);
    }
}
