import com.aliyun.teaopenapi.models.Config;
import com.aliyun.teaopenapi.models.OpenApiRequest;
import com.aliyun.teaopenapi.models.Params;
import com.aliyun.teautil.models.RuntimeOptions;
import com.google.gson.Gson;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.util.LinkedHashMap;
import java.util.Map;

/**
 * Obtains credentials as the SDK does by itself; each line of input asks once more: `new` with a new client, `kept` with the one
 * that lives as long as the process. The argument is where STS is (host:port). Prints JSON lines.
 */
final class Client {
  public static void main(String[] args) throws Exception {
    var lines = new BufferedReader(new InputStreamReader(System.in));
    com.aliyun.credentials.Client kept = null;
    for (var line = lines.readLine(); line != null; line = lines.readLine()) {
      var isKept = line.equals("kept");
      var provider = isKept && kept != null ? kept : new com.aliyun.credentials.Client();
      if (isKept) {
        kept = provider;
      }
      System.out.println(new Gson().toJson(ask(args[0], provider)));
    }
    // The SDK's refresh threads are no daemons.
    System.exit(0);
  }

  private static Map<String, Object> ask(String sts, com.aliyun.credentials.Client provider) throws Exception {
    var given = provider.getCredential();
    var params = new Params()
        .setAction("GetCallerIdentity")
        .setVersion("2015-04-01")
        .setProtocol("HTTP")
        .setPathname("/")
        .setMethod("POST")
        .setAuthType("AK")
        .setStyle("RPC")
        .setReqBodyType("formData")
        .setBodyType("json");
    var config = new Config().setCredential(provider).setEndpoint(sts).setProtocol("http");
    var api = new com.aliyun.teaopenapi.Client(config);
    var body = (Map<?, ?>) api.callApi(params, new OpenApiRequest(), new RuntimeOptions()).get("body");

    var answer = new LinkedHashMap<String, Object>();
    answer.put("AccessKeyId", given.getAccessKeyId());
    answer.put("AccessKeySecret", given.getAccessKeySecret());
    answer.put("SecurityToken", given.getSecurityToken());
    answer.put("Arn", body.get("Arn"));
    answer.put("Version", version());
    return answer;
  }

  /** The name of the jar that the SDK was loaded from tells its version. */
  private static String version() {
    var jar = com.aliyun.credentials.Client.class.getProtectionDomain().getCodeSource().getLocation().getPath();
    return jar.replaceAll(".*credentials-java-|\\.jar$", "");
  }
}
