"""Generated from protos/mesh/directory/etcdpb/rpc.proto: etcd's gRPC interface, the part used."""
