// Command server is Vault's own core and HTTP interface on loopback, with what the key management service needs and
// nothing else: the engines transit and kv, AppRole, Shamir seal, files as storage, TLS. It is what the tests of
// streams/keys/kms_vault.py talk to. It is uninitialised at first, and sealed after each start, as any Vault.
//
//	server PORT STORAGE_FOLDER CERTIFICATE PRIVATE_KEY
//
// It says "ready" on standard output when it listens, and ends with its standard input.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	nethttp "net/http"
	"os"
	"time"
	_ "unsafe" // for go:linkname

	"github.com/hashicorp/go-hclog"
	kv "github.com/hashicorp/vault-plugin-secrets-kv"
	"github.com/hashicorp/vault/builtin/credential/approle"
	"github.com/hashicorp/vault/builtin/logical/transit"
	"github.com/hashicorp/vault/helper/metricsutil"
	"github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical/file"
	"github.com/hashicorp/vault/vault"
)

// registry says that nothing is a plugin: all engines are linked in.
type registry struct{}

func (registry) Contains(string, consts.PluginType) bool                   { return false }
func (registry) Get(string, consts.PluginType) (func() (any, error), bool) { return nil, false }
func (registry) Keys(consts.PluginType) []string                           { return nil }
func (registry) IsBuiltinEntPlugin(string, consts.PluginType) bool         { return false }
func (registry) DeprecationStatus(string, consts.PluginType) (consts.DeprecationStatus, bool) {
	return consts.Unknown, false
}

// transitFactory is transit.Factory without operations that can never be chosen: the library as published takes these,
// a "create" of what cannot be said to exist, for a mistake, and no longer for nothing.
func transitFactory(ctx context.Context, config *logical.BackendConfig) (logical.Backend, error) {
	backend, err := transit.Backend(ctx, config)
	if err != nil {
		return nil, err
	}
	for _, path := range backend.Paths {
		if path.ExistenceCheck == nil {
			delete(path.Operations, logical.CreateOperation)
			delete(path.Callbacks, logical.CreateOperation)
		}
	}
	return backend, backend.Setup(ctx, config)
}

// entPaths are the places where Vault says that a feature is not in this edition. They are declared with the same
// mistake, so there are none here.
//
//go:linkname entPaths github.com/hashicorp/vault/vault.entPaths
var entPaths func(*vault.SystemBackend) []*framework.Path

func main() {
	entPaths = func(*vault.SystemBackend) []*framework.Path { return nil }
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 5 {
		return fmt.Errorf("usage: server PORT STORAGE_FOLDER CERTIFICATE PRIVATE_KEY")
	}
	address := "127.0.0.1:" + args[1]
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Warn, Output: os.Stderr})
	storage, err := file.NewFileBackend(map[string]string{"path": args[2]}, logger)
	if err != nil {
		return err
	}
	core, err := vault.NewCore(&vault.CoreConfig{
		Physical:           storage,
		StorageType:        "file",
		Logger:             logger,
		BuiltinRegistry:    registry{},
		LogicalBackends:    map[string]logical.Factory{"transit": transitFactory, "kv": kv.Factory},
		CredentialBackends: map[string]logical.Factory{"approle": approle.Factory},
		MetricSink:         metricsutil.BlackholeSink(),
		RedirectAddr:       "https://" + address,
		DisableMlock:       true,
	})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := &nethttp.Server{
		Handler:           http.Handler.Handler(&vault.HandlerProperties{Core: core}),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          logger.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Error}),
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = server.Shutdown(context.Background())
	}()
	fmt.Println("ready")
	if err := server.ServeTLS(listener, args[3], args[4]); err != nethttp.ErrServerClosed {
		return err
	}
	return core.Shutdown()
}
