//! Clusters that are read, and those that are refused.

use super::*;

const TWO: &str = r#"
    format = 1
    [[group]]
    name = "fast"
    kind = "h800"
    nodes = 4
    devices = 8
    inside_bytes_per_s = 200e9
    nics = 8
    nic_bytes_per_s = 25e9
    [[group]]
    name = "slow"
    kind = "c550"
    nodes = 2
    devices = 8
    memory_bytes = 60000000000
    nics = 4
    nic_bytes_per_s = 12.5e9
    [[link]]
    between = ["slow", "fast"]
    bytes_per_s = 12.5e9
    path = "host-staged"
"#;

fn error(from: &str, to: &str) -> String {
    assert!(TWO.contains(from), "{from}");
    Topology::from_toml("cluster.toml", &TWO.replacen(from, to, 1)).unwrap_err().to_string()
}

#[test]
fn links_are_what_ports_and_rows_allow() {
    let topology = Topology::from_toml("cluster.toml", TWO).unwrap();
    assert_eq!(topology.num_devices(), 48);
    assert!((topology.link(0, 0).unwrap().bytes_per_s - 200e9).abs() < 1.0);
    assert!((topology.link(1, 1).unwrap().bytes_per_s - 50e9).abs() < 1.0);
    let across = topology.link(0, 1).unwrap();
    assert_eq!(across, topology.link(1, 0).unwrap());
    assert_eq!((across.path, across.latency_ns), (LinkPath::HostStaged, 60_000));
    assert_eq!(Topology::from_toml("x", &topology.to_toml()).unwrap(), topology);
    let any = TWO.replace(r#"["slow", "fast"]"#, r#"["*", "*"]"#);
    assert_eq!(Topology::from_toml("x", &any).unwrap().link(1, 0), Some(across));
}

#[test]
fn missing_and_contradictory_links_are_named() {
    let missing = error(r#"between = ["slow", "fast"]"#, r#"between = ["slow", "slow"]"#);
    assert_eq!(
        missing,
        "cluster.toml: `link` is missing between fast and slow, but must be there: add [[link]] between = \
         [\"fast\", \"slow\"] with its bytes_per_s, or one between = [\"*\", \"*\"] for all unlike groups"
    );
    let twice =
        error("    [[link]]", "[[link]]\nbetween = [\"fast\", \"slow\"]\nbytes_per_s = 1e9\n[[link]]");
    assert!(twice.contains("there twice, with 1000000000 bytes/s and 12500000000 bytes/s"), "{twice}");
    let impossible = error("bytes_per_s = 12.5e9\n    path", "bytes_per_s = 60e9\n    path");
    assert!(
        impossible.contains("at most 50000000000: what the nics of a node of slow carry"),
        "{impossible}"
    );
    assert!(error(r#"["slow", "fast"]"#, r#"["slow", "fsat"]"#).contains("did you mean `fast`?"));
    assert!(error(r#"["slow", "fast"]"#, r#"["slow", "*"]"#).contains("`link.between` is \"*\""));
}

#[test]
fn impossible_groups_are_refused() {
    assert!(error("nodes = 4", "nodes = 0").contains("`group.nodes of fast` is 0, but must be at least 1"));
    assert!(error("devices = 8", "devices = 0").contains("`group.devices of fast` is 0"));
    assert!(error("nics = 8", "nics = 0").contains("`group.nics of fast` is 0"));
    assert!(error("200e9", "-1.0").contains("`group.inside_bytes_per_s of fast` is -1"));
    assert!(error("60000000000", "60").contains("`group.memory_bytes of slow` is 60"));
    assert!(error("\"slow\"", "\"fast\"").contains("\"fast\" twice"));
    assert!(error("\"fast\"", "\"fa st\"").contains("letters, digits"));
    assert!(error("nodes = 4", "nodes = 400000").contains("at most 1048576"));
    assert!(error("format = 1", "format = 2").contains("`format` is 2"));
    assert!(error("nics = 8", "nic = 8").contains("did you mean `nics`?"));
    assert!(
        Topology::from_toml("x", "format = 1\ngroup = []").unwrap_err().to_string().contains("at least one")
    );
}

#[test]
fn kinds_are_looked_up_in_the_catalogue() {
    let topology = Topology::from_toml("cluster.toml", TWO).unwrap();
    let mut catalogue = Catalogue::default();
    for (name, text) in [
        ("h800", include_str!("../../../../accelerators/h800.toml")),
        ("c500", include_str!("../../../../accelerators/c500.toml")),
    ] {
        catalogue.insert(Accelerator::from_toml(name, text).unwrap());
    }
    let error = topology.resolve("cluster.toml", &catalogue).unwrap_err().to_string();
    assert_eq!(
        error,
        "cluster.toml: `group.kind of slow` is \"c550\", but must be a name of the catalogue; near are c500"
    );
    let c550 = include_str!("../../../../accelerators/c550.toml");
    catalogue.insert(Accelerator::from_toml("c550", c550).unwrap());
    let groups = topology.resolve("cluster.toml", &catalogue).unwrap();
    assert_eq!(groups[0].memory_bytes, 80 << 30);
    assert_eq!(groups[1].memory_bytes, 60_000_000_000);
    assert_eq!((groups[0].confidence, groups[1].confidence), (Confidence::Vendor, Confidence::Estimate));
    assert!((groups[0].inside.bytes_per_s - 200e9).abs() < 1.0);
}
