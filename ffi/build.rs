//! What only the linker can be told about the shared library.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // The name programs record; it changes when the ABI breaks.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libqcowrecycle.so.0");
    // Threads of the library may live as long as the process, so its code must, even after a dlclose.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // A symbol that nobody defines is an error here rather than in the program.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,defs");
}
