//! `bench-library raw` is the raw file, `bench-library library` the library through its C interface.

mod library;
mod raw;
mod ring;

use std::io;

use bench_work::disk::Shared;
use bench_work::serve::serve;

fn main() -> io::Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("raw") => serve(&Shared::new(raw::File::open)),
        Some("library") => serve(&Shared::new(library::Image::open)),
        _ => Err(io::Error::other("which contender: raw or library?")),
    }
}
