//! Where ranks can be reached.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;

use hgct_core::ids::Rank;
use socket2::{Domain, Protocol, Socket, Type};

use crate::error::{Error, Result};

/// One way to reach a rank: an address of one of its host's network cards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Address as others see it, which need not be the one that is bound.
    pub address: SocketAddr,
    /// Payload rate of the card, where known.
    pub rate_bytes_per_s: Option<u64>,
    /// Name of the card, where known.
    pub nic: Option<String>,
    /// NUMA node of the card, where known.
    pub numa: Option<u32>,
}

impl Endpoint {
    /// An endpoint of which only the address is known.
    pub fn new(address: SocketAddr) -> Self {
        Self { address, rate_bytes_per_s: None, nic: None, numa: None }
    }
}

/// One member of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its rank.
    pub rank: Rank,
    /// Its host. Ranks with the same text try shared memory; anything unique to a boot of an OS
    /// instance will do.
    pub host_id: String,
    /// How to reach it, best first. Without any it dials others and is not dialled.
    pub endpoints: Vec<Endpoint>,
}

/// Sockets on which this rank takes connections. It outlives communicators: each generation connects
/// over the same one.
pub struct Listener {
    pub(crate) sockets: Vec<TcpListener>,
    endpoints: Vec<Endpoint>,
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("endpoints", &self.endpoints).finish_non_exhaustive()
    }
}

impl Listener {
    /// Listens on addresses; port 0 lets the system choose.
    pub fn bind(addresses: &[SocketAddr]) -> Result<Self> {
        let mut listener = Self { sockets: Vec::new(), endpoints: Vec::new() };
        for &address in addresses {
            let bound = bind(address).and_then(|socket| Ok((socket.local_addr()?, socket)));
            let (local, socket) =
                bound.map_err(|source| Error::Bind { address, source: Arc::new(source) })?;
            listener.endpoints.push(Endpoint::new(local));
            listener.sockets.push(socket);
        }
        Ok(listener)
    }

    /// A listener that takes no connection: this rank dials all others.
    pub fn none() -> Self {
        Self { sockets: Vec::new(), endpoints: Vec::new() }
    }

    /// The bound addresses, with their real ports, as endpoints to advertise.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.endpoints.clone()
    }

    /// The endpoints as seen from outside: the bound ports under another address, for sockets bound
    /// to all addresses of a host, or behind a translation.
    pub fn endpoints_at(&self, address: IpAddr) -> Vec<Endpoint> {
        let seen = |endpoint: &Endpoint| Endpoint::new(SocketAddr::new(address, endpoint.address.port()));
        self.endpoints.iter().map(seen).collect()
    }
}

/// Connections that may wait to be taken: strangers must not fill the queue before a peer comes.
const BACKLOG: i32 = 1024;

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_chooses_ports_and_a_taken_one_is_an_error() {
        let listener = Listener::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
        let address = listener.endpoints()[0].address;
        assert_ne!(address.port(), 0);
        let seen = listener.endpoints_at("10.1.2.3".parse().unwrap());
        assert_eq!(seen[0].address, SocketAddr::new("10.1.2.3".parse().unwrap(), address.port()));
        let error = Listener::bind(&[address]).unwrap_err();
        assert!(error.to_string().contains(&address.to_string()), "{error}");
    }
}
